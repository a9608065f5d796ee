"""The decoder around the blocks: embedding, the scan over layers, final norm, head."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float, Int

from jaxdistill import models, weights
from jaxdistill.models import embedding
from jaxdistill.models.attention import REFERENCE, Attention, Scores
from jaxdistill.models.attention.packed import packed_attention
from jaxdistill.models.config import Config
from jaxdistill.models.layers import Angles, Projection, capped, offset_norm, projection, rms_norm, rope_angles
from jaxdistill.models.remat import Remat, saving
from jaxdistill.sharding import einsum, gather
from jaxdistill.weights import Weight, ones, weight, zeros


@struct.dataclass
class Params:
    """Every weight of a model. `unembed` is None where the embedding is tied."""

    blocks: Any
    embed: Weight = weight("VD", "model.embed_tokens.weight")
    final_norm: Weight = weight("M", "model.norm.weight", init=ones)
    unembed: Weight | None = weight("VD", "lm_head.weight")


def template(c: Config) -> Params:
    """The weights this architecture has, as declarations without data."""
    blocks = weights.template(models.family(c.model_type).Block, c.sizes())
    made = weights.template(Params, c.sizes(), blocks=blocks, **({"unembed": None} if c.tied else {}))
    if c.offset_norms:
        return dataclasses.replace(made, final_norm=dataclasses.replace(made.final_norm, init=zeros))
    return made


def size(c: Config) -> str:
    """How many parameters the model has and, where they are others, how many of them a token goes through."""
    total = weights.count(template(c))
    active = total - (c.stored_matmul_weights[0] - c.matmul_weights[0])
    return f"{total:,} parameters" + (f", {active:,} of them active for a token" if c.experts else "")


def head(params: Params) -> Weight:
    """The [V, D] matrix that turns hidden states into logits."""
    return params.embed if params.unembed is None else params.unembed


def hidden(
    params: Params,
    tokens: Int[Array, "B T"],
    positions: Int[Array, "B T"],
    segments: Int[Array, "B T"],
    c: Config,
    dtype: Any,
    remat: Remat = "full",
    noise: Float[Array, "B T D"] | None = None,
    attention: Attention = REFERENCE,
    project: Projection = projection,
) -> tuple[Float[Array, "B T D"], Any]:
    """Hidden states before the head, of packed rows, which stand as `sharding.row_order` has them.

    And where the routers of a mixture's layers send the rows' tokens, stacked on L; None of a dense model.

    Args:
      positions: from 0 within each document.
      segments: the document each position belongs to; attention never crosses documents. 0 is padding.
      remat: what the backward pass finds saved.
      noise: added to the embeddings (NEFTune).
      attention: its backend, and how it crosses the context axis.
      project: multiplies with the weights of the layers.
    """
    run = layer(positions, segments, c, attention, project)
    x = embed(params, tokens, c, dtype)
    if noise is not None:
        x += noise
    kinds = c.windowed if len(set(c.windowed)) > 1 else None  # else of one kind, and no array says which

    def one(x: Array, item: Any) -> tuple[Array, Any]:
        w, windowed = item
        return run(x, w, any(c.windowed) if kinds is None else windowed)

    x, routing = jax.lax.scan(saving(remat, one), x, (params.blocks, None if kinds is None else jnp.array(kinds)))
    return final(params, x, c), routing


def layer(
    positions: Int[Array, "B T"],
    segments: Int[Array, "B T"],
    c: Config,
    attention: Attention = REFERENCE,
    project: Projection = projection,
) -> Callable[[Array, Any, Any], tuple[Array, Any]]:
    """One layer on packed rows: a function of hidden states, the layer's weights, and whether the layer is windowed.

    That last may be an array of the devices: so one scan runs over layers of both kinds. It returns the new hidden
    states and, of a mixture, where the router sends real tokens.
    """
    family = models.family(c.model_type)
    angles = angles_of_kinds(positions, c)
    T = positions.shape[1]
    windows = c.windows(T)

    def run(x: Array, w: Any, windowed: Any) -> tuple[Array, Any]:
        window = None
        if windows:
            window = (
                (c.window if windowed else None) if isinstance(windowed, bool) else jnp.where(windowed, c.window, T)
            )

        def attend(q: Array, k: Array, v: Array) -> tuple[Array, None]:
            return packed_attention(q, k, v, segments, attention, Scores(c.score_scale, c.score_cap), window), None

        inputs = x, w, angles(windowed), attend, c, project
        if c.experts:
            x, _, routing = family.routed_block(*inputs, segments > 0)
            return x, routing
        return family.block(*inputs)[0], None

    return run


def angles_of_kinds(positions: Int[Array, "B T"], c: Config) -> Callable[[Any], Angles]:
    """The rotations of each position by whether a layer is windowed, computed once for all layers."""
    everywhere = rope_angles(positions, c.rope, c.head_dim)
    if c.local_rope is None:
        return lambda windowed: everywhere
    local = rope_angles(positions, c.local_rope, c.head_dim)

    def of(windowed: Any) -> Angles:
        if isinstance(windowed, bool):
            return local if windowed else everywhere
        return jax.tree.map(lambda a, b: jnp.where(windowed, a, b), local, everywhere)

    return of


def embed(params: Params, tokens: Int[Array, "B T"], c: Config, dtype: Any) -> Float[Array, "B T D"]:
    """Embeddings as the first layer takes them."""
    return scaled(embedding.lookup(params.embed, tokens, dtype), c)


def scaled(rows: Float[Array, "*dims D"], c: Config) -> Float[Array, "*dims D"]:
    """Rows of the embedding as the first layer takes them."""
    return rows if c.embed_scale == 1 else rows * jnp.asarray(c.embed_scale, rows.dtype)


def final(params: Params, x: Float[Array, "B T D"], c: Config) -> Float[Array, "B T D"]:
    """The norm after the last layer."""
    return normed(x, params.final_norm, c)


def normed(x: Float[Array, "B T D"], scale: Float[Array, " D"], c: Config) -> Float[Array, "B T D"]:
    """Hidden states through the norm after the last layer."""
    return (offset_norm if c.offset_norms else rms_norm)(x, scale, c.norm_eps)


def logits(params: Params, x: Float[Array, "B T D"], c: Config) -> Float[Array, "B T V"]:
    """Logits in float32. For training use loss.py, which never holds a row of them."""
    w = gather(head(params), "VD", x.dtype)
    return capped(einsum("BTD,VD->BTV", x, w, preferred_element_type=jnp.float32), c.logit_cap)
