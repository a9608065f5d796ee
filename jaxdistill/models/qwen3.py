"""Qwen3, dense: Llama with a norm on each head's queries and keys, and a head size of its own."""

from collections.abc import Mapping
from typing import Any

from flax import struct
from jaxtyping import Array, Float

from jaxdistill.models.attention import Attend
from jaxdistill.models.config import Config, read_config
from jaxdistill.models.layers import Angles, Projection, apply_rope, projection, rms_norm, swiglu
from jaxdistill.weights import Weight, ones, weight


@struct.dataclass
class Block:
    """Weights of all layers, stacked on L."""

    attn_norm: Weight = weight("LM", "model.layers.{}.input_layernorm.weight", init=ones)
    w_q: Weight = weight("LDNH", "model.layers.{}.self_attn.q_proj.weight", "(N H) D")
    w_k: Weight = weight("LDKH", "model.layers.{}.self_attn.k_proj.weight", "(K H) D")
    w_v: Weight = weight("LDKH", "model.layers.{}.self_attn.v_proj.weight", "(K H) D")
    w_o: Weight = weight("LNHD", "model.layers.{}.self_attn.o_proj.weight", "D (N H)")
    q_norm: Weight = weight("LH", "model.layers.{}.self_attn.q_norm.weight", init=ones)
    k_norm: Weight = weight("LH", "model.layers.{}.self_attn.k_norm.weight", init=ones)
    mlp_norm: Weight = weight("LM", "model.layers.{}.post_attention_layernorm.weight", init=ones)
    w_gate: Weight = weight("LDF", "model.layers.{}.mlp.gate_proj.weight", "F D")
    w_up: Weight = weight("LDF", "model.layers.{}.mlp.up_proj.weight", "F D")
    w_down: Weight = weight("LFD", "model.layers.{}.mlp.down_proj.weight", "D F")


def config(hf: Mapping[str, Any]) -> Config:
    """Reads config.json."""
    return read_config(
        {"head_dim": 128, **hf},
        unsupported={"hidden_act": "silu", "attention_bias": False, "use_sliding_window": False},
    )


def block(
    x: Float[Array, "B T D"], w: Block, angles: Angles, attend: Attend, c: Config, project: Projection = projection
) -> tuple[Float[Array, "B T D"], Any]:
    """One layer. Returns its output and whatever `attend` keeps (a cache when sampling)."""
    x, kept = attended(x, w, angles, attend, c, project)
    return x + swiglu(rms_norm(x, w.mlp_norm, c.norm_eps), w, project), kept


def attended(
    x: Float[Array, "B T D"], w: Any, angles: Angles, attend: Attend, c: Config, project: Projection
) -> tuple[Float[Array, "B T D"], Any]:
    """The first half of a layer."""
    h = rms_norm(x, w.attn_norm, c.norm_eps)
    q = rms_norm(project("BTD,DNH->BTNH", h, w.w_q), w.q_norm, c.norm_eps)
    k = rms_norm(project("BTD,DKH->BTKH", h, w.w_k), w.k_norm, c.norm_eps)
    v = project("BTD,DKH->BTKH", h, w.w_v)
    out, kept = attend(apply_rope(q, angles), apply_rope(k, angles), v)
    return x + project("BTNH,NHD->BTD", out, w.w_o), kept
