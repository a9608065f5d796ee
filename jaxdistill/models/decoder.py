"""The decoder around the blocks: embedding, the scan over layers, final norm, head."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float, Int

from jaxdistill import models, weights
from jaxdistill.models import embedding
from jaxdistill.models.attention import REFERENCE, Attention
from jaxdistill.models.attention.packed import packed_attention
from jaxdistill.models.config import Config
from jaxdistill.models.layers import Projection, projection, rms_norm, rope_angles
from jaxdistill.models.remat import Remat, saving
from jaxdistill.sharding import einsum, gather
from jaxdistill.weights import Weight, ones, weight


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
    return weights.template(Params, c.sizes(), blocks=blocks, **({"unembed": None} if c.tied else {}))


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
) -> Float[Array, "B T D"]:
    """Hidden states before the head, of packed rows, which stand as `sharding.row_order` has them.

    Args:
      positions: from 0 within each document.
      segments: the document each position belongs to; attention never crosses documents. 0 is padding.
      remat: what the backward pass finds saved.
      noise: added to the embeddings (NEFTune).
      attention: its backend, and how it crosses the context axis.
      project: multiplies with the weights of the layers.
    """
    block = models.family(c.model_type).block
    angles = rope_angles(positions, c.rope, c.head_dim)

    def layer(x, w):
        return block(x, w, angles, lambda q, k, v: (packed_attention(q, k, v, segments, attention), None), c, project)

    x = embedding.lookup(params.embed, tokens, dtype)
    if noise is not None:
        x += noise
    x, _ = jax.lax.scan(saving(remat, layer), x, params.blocks)
    return rms_norm(x, params.final_norm, c.norm_eps)


def logits(params: Params, x: Float[Array, "B T D"]) -> Float[Array, "B T V"]:
    """Logits in float32. For training use loss.py, which never holds a row of them."""
    w = gather(head(params), "VD", x.dtype)
    return einsum("BTD,VD->BTV", x, w, preferred_element_type=jnp.float32)
