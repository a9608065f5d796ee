"""OLMo 2: norms after attention and MLP in place of before, and one norm over all heads' queries, and keys."""

from collections.abc import Mapping
from typing import Any

from flax import struct
from jaxtyping import Array, Float

from jaxdistill.models.attention import Attend
from jaxdistill.models.config import Config, read_config
from jaxdistill.models.layers import Angles, Projection, apply_rope, projection, rms_norm32, swiglu
from jaxdistill.weights import Weight, ones, weight

_HEADS = (-2, -1)  # of queries [B, T, N, H]


@struct.dataclass
class Block:
    """Weights of all layers, stacked on L."""

    w_q: Weight = weight("LDNH", "model.layers.{}.self_attn.q_proj.weight", "(N H) D")
    w_k: Weight = weight("LDKH", "model.layers.{}.self_attn.k_proj.weight", "(K H) D")
    w_v: Weight = weight("LDKH", "model.layers.{}.self_attn.v_proj.weight", "(K H) D")
    w_o: Weight = weight("LNHD", "model.layers.{}.self_attn.o_proj.weight", "D (N H)")
    q_norm: Weight = weight("LNH", "model.layers.{}.self_attn.q_norm.weight", "(N H)", init=ones)
    k_norm: Weight = weight("LKH", "model.layers.{}.self_attn.k_norm.weight", "(K H)", init=ones)
    attn_norm: Weight = weight("LM", "model.layers.{}.post_attention_layernorm.weight", init=ones)
    w_gate: Weight = weight("LDF", "model.layers.{}.mlp.gate_proj.weight", "F D")
    w_up: Weight = weight("LDF", "model.layers.{}.mlp.up_proj.weight", "F D")
    w_down: Weight = weight("LFD", "model.layers.{}.mlp.down_proj.weight", "D F")
    mlp_norm: Weight = weight("LM", "model.layers.{}.post_feedforward_layernorm.weight", init=ones)


def config(hf: Mapping[str, Any]) -> Config:
    """Reads config.json."""
    return read_config({"rms_norm_eps": 1e-5, **hf}, unsupported={"hidden_act": "silu", "attention_bias": False})


def block(
    x: Float[Array, "B T D"], w: Block, angles: Angles, attend: Attend, c: Config, project: Projection = projection
) -> tuple[Float[Array, "B T D"], Any]:
    """One layer. Returns its output and whatever `attend` keeps (a cache when sampling)."""
    q = rms_norm32(project("BTD,DNH->BTNH", x, w.w_q), w.q_norm, c.norm_eps, _HEADS)
    k = rms_norm32(project("BTD,DKH->BTKH", x, w.w_k), w.k_norm, c.norm_eps, _HEADS)
    v = project("BTD,DKH->BTKH", x, w.w_v)
    out, kept = attend(apply_rope(q, angles), apply_rope(k, angles), v)
    x = x + rms_norm32(project("BTNH,NHD->BTD", out, w.w_o), w.attn_norm, c.norm_eps)
    return x + rms_norm32(swiglu(x, w, project), w.mlp_norm, c.norm_eps), kept
