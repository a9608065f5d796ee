"""Qwen3, mixture of experts: Qwen3 with many small MLPs, of which each token goes through a few."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Int

from jaxdistill.errors import UserError
from jaxdistill.models.attention import Attend
from jaxdistill.models.config import Config, read_config, write_rope
from jaxdistill.models.layers import PROJECTION_NAME, Angles, Projection, by_stretches, projection, rms_norm
from jaxdistill.models.qwen3 import attended
from jaxdistill.models.routing import Routing, choose
from jaxdistill.sharding import gather, relayout, spec, split_over
from jaxdistill.weights import Weight, ones, weight


@struct.dataclass
class Block:
    """Weights of all layers, stacked on L, and of all experts, stacked on E."""

    attn_norm: Weight = weight("LM", "model.layers.{}.input_layernorm.weight", init=ones)
    w_q: Weight = weight("LDNH", "model.layers.{}.self_attn.q_proj.weight", "(N H) D")
    w_k: Weight = weight("LDKH", "model.layers.{}.self_attn.k_proj.weight", "(K H) D")
    w_v: Weight = weight("LDKH", "model.layers.{}.self_attn.v_proj.weight", "(K H) D")
    w_o: Weight = weight("LNHD", "model.layers.{}.self_attn.o_proj.weight", "D (N H)")
    q_norm: Weight = weight("LH", "model.layers.{}.self_attn.q_norm.weight", init=ones)
    k_norm: Weight = weight("LH", "model.layers.{}.self_attn.k_norm.weight", init=ones)
    mlp_norm: Weight = weight("LM", "model.layers.{}.post_attention_layernorm.weight", init=ones)
    w_router: Weight = weight("LDE", "model.layers.{}.mlp.gate.weight", "E D")
    w_gate: Weight = weight("LEDf", "model.layers.{}.mlp.experts.{}.gate_proj.weight", "f D")
    w_up: Weight = weight("LEDf", "model.layers.{}.mlp.experts.{}.up_proj.weight", "f D")
    w_down: Weight = weight("LEfD", "model.layers.{}.mlp.experts.{}.down_proj.weight", "D f")


def config(hf: Mapping[str, Any]) -> Config:
    """Reads config.json. Models with dense layers among the others are refused."""
    experts = hf.get("num_experts", hf.get("num_local_experts"))  # transformers 4 and 5
    sizes = {"num_experts": experts} | {key: hf.get(key) for key in ("num_experts_per_tok", "moe_intermediate_size")}
    if missing := [key for key, size in sizes.items() if size is None]:
        raise UserError(f"config.json of model_type {hf.get('model_type')!r}: {', '.join(missing)} missing")
    chosen = hf["num_experts_per_tok"]
    if not 1 <= chosen <= experts:
        raise UserError(f"config.json: num_experts_per_tok is {chosen}, of {experts} experts; expected 1 to {experts}")
    c = read_config(
        {**hf, "intermediate_size": hf["moe_intermediate_size"]},
        unsupported={
            "hidden_act": "silu",
            "attention_bias": False,
            "use_sliding_window": False,
            "decoder_sparse_step": 1,
            "mlp_only_layers": [],
        },
    )
    coefficient = float(hf.get("router_aux_loss_coef", 0.001)) if hf.get("output_router_logits") else 0.0
    return dataclasses.replace(
        c,
        experts=experts,
        experts_per_token=chosen,
        normed_choice=bool(hf.get("norm_topk_prob", False)),
        router_aux_loss_coef=coefficient,
    )


def write_config(hf: Mapping[str, Any]) -> dict[str, Any]:
    """The config with RoPE and the number of experts spelled so that transformers 4 and 5 read the same."""
    experts = hf.get("num_experts", hf.get("num_local_experts"))
    return {**write_rope(hf), "num_experts": experts, "num_local_experts": experts}


def block(
    x: Float[Array, "B T D"], w: Block, angles: Angles, attend: Attend, c: Config, project: Projection = projection
) -> tuple[Float[Array, "B T D"], Any]:
    """One layer. Returns its output and whatever `attend` keeps (a cache when sampling)."""
    x, kept, _ = routed_block(x, w, angles, attend, c, project, jnp.ones_like(x[..., 0], jnp.bool_))
    return x, kept


def routed_block(
    x: Float[Array, "B T D"],
    w: Block,
    angles: Angles,
    attend: Attend,
    c: Config,
    project: Projection,
    real: Bool[Array, "B T"],
) -> tuple[Float[Array, "B T D"], Any, Routing]:
    """As `block`, and where the router sends those positions that are real."""
    x, kept = attended(x, w, angles, attend, c, project)
    h = rms_norm(x, w.mlp_norm, c.norm_eps)
    scores = relayout(project("BTD,DE->BTE", h, w.w_router), "BT.")  # each device sees those of all experts
    share, expert, routing = choose(scores, real, c)

    def mixture(tokens: tuple[Array, Array, Array], w_gate: Weight, w_up: Weight, w_down: Weight) -> Array:
        return experts(*tokens, w_gate, w_up, w_down)

    return x + by_stretches(mixture, (h, share, expert), w.w_gate, w.w_up, w.w_down), kept, routing


def experts(
    x: Float[Array, "B T D"],
    share: Float[Array, "B T k"],
    expert: Int[Array, "B T k"],
    w_gate: Float[Array, "E D f"],
    w_up: Float[Array, "E D f"],
    w_down: Float[Array, "E f D"],
) -> Float[Array, "B T D"]:
    """Every token through its experts, weighted by their shares; none is dropped.

    Experts are split over tensor, where all devices have the same tokens: each computes what goes through its own, and
    the results are added up. So no token travels; what does is [B, T, D], as in the MLP of a dense model.
    """
    stored = ((w_gate, "EDf"), (w_up, "EDf"), (w_down, "EfD"))
    gathered: list[Any] = [gather(w, dims, x.dtype) for w, dims in stored]
    # Weights are `reduced` for the sake of their gradient alone. jax 0.10 fails to lower a shard_map of those over one
    # device, and when sampling, where context splits no tokens, they do not go with tokens that are not split over it
    if jax.sharding.get_abstract_mesh().size == 1 or not split_over(spec("T")):
        gathered = [jax.sharding.reshard(w, spec(dims)) for w, (_, dims) in zip(gathered, stored, strict=True)]
    made: Any = jax.shard_map(_local, out_specs=spec("BTD"))(x, share, expert, *gathered)
    return made


def _local(x: Array, share: Array, expert: Array, w_gate: Array, w_up: Array, w_down: Array) -> Float[Array, "B T D"]:
    """What one device's experts add to its tokens, and the sum of that over the devices.

    Each token stands as often as it has chosen experts, in the order of the experts; those of other devices are the
    last. Every array is as if all chosen were here: how many are, only the data say.
    """
    E, D, chosen = w_gate.shape[0], x.shape[-1], expert.shape[-1]
    place = expert.reshape(-1) - jax.lax.axis_index("tensor") * E
    here = (place >= 0) & (place < E)
    place = jnp.where(here, place, E)
    order = jnp.argsort(place)  # stable
    rows_of = jnp.sum(place[:, None] == jnp.arange(E), axis=0, dtype=jnp.int32)
    # Repeated, then permuted: the gradient of a permutation adds nothing up, so it has one order on every device.
    # And what lies after the last expert's rows counts for nothing, whatever a kernel leaves there, in both directions.
    repeated = jnp.where(here[:, None], jnp.repeat(x.reshape(-1, D), chosen, axis=0), 0)
    rows = _permuted(repeated, order)

    def times(rows: Array, w: Array) -> Array:
        return checkpoint_name(jax.lax.ragged_dot(rows, w, rows_of), PROJECTION_NAME)

    out = times(jax.nn.silu(times(rows, w_gate)) * times(rows, w_up), w_down)
    out = jnp.where(here[:, None], _permuted(out, jnp.argsort(order)), 0)
    out = out.reshape(*expert.shape, D).astype(jnp.float32) * share[..., None]
    return jax.lax.psum(jnp.sum(out, axis=-2).astype(x.dtype), "tensor")


def _permuted(rows: Float[Array, "n D"], order: Array) -> Float[Array, "n D"]:
    return rows.at[order].get(unique_indices=True, mode="promise_in_bounds")
