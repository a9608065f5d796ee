"""Gemma 3, text: Gemma 2 with norms of queries and keys for its soft cap, and another RoPE in windowed layers."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from flax import struct
from jaxtyping import Array, Float

from jaxdistill.models.attention import Attend
from jaxdistill.models.config import Config, read_rope
from jaxdistill.models.gemma2 import UNSUPPORTED, gemma, mlp
from jaxdistill.models.layers import Angles, Projection, apply_rope, offset_norm, projection
from jaxdistill.weights import Weight, weight, zeros

_THETA, _LOCAL_THETA = 1_000_000.0, 10_000.0  # of transformers, where config.json has none


@struct.dataclass
class Block:
    """Weights of all layers, stacked on L."""

    attn_norm: Weight = weight("LM", "model.layers.{}.input_layernorm.weight", init=zeros)
    w_q: Weight = weight("LDNH", "model.layers.{}.self_attn.q_proj.weight", "(N H) D")
    w_k: Weight = weight("LDKH", "model.layers.{}.self_attn.k_proj.weight", "(K H) D")
    w_v: Weight = weight("LDKH", "model.layers.{}.self_attn.v_proj.weight", "(K H) D")
    w_o: Weight = weight("LNHD", "model.layers.{}.self_attn.o_proj.weight", "D (N H)")
    q_norm: Weight = weight("LH", "model.layers.{}.self_attn.q_norm.weight", init=zeros)
    k_norm: Weight = weight("LH", "model.layers.{}.self_attn.k_norm.weight", init=zeros)
    attn_out_norm: Weight = weight("LM", "model.layers.{}.post_attention_layernorm.weight", init=zeros)
    mlp_norm: Weight = weight("LM", "model.layers.{}.pre_feedforward_layernorm.weight", init=zeros)
    w_gate: Weight = weight("LDF", "model.layers.{}.mlp.gate_proj.weight", "F D")
    w_up: Weight = weight("LDF", "model.layers.{}.mlp.up_proj.weight", "F D")
    w_down: Weight = weight("LFD", "model.layers.{}.mlp.down_proj.weight", "D F")
    mlp_out_norm: Weight = weight("LM", "model.layers.{}.post_feedforward_layernorm.weight", init=zeros)


def config(hf: Mapping[str, Any]) -> Config:
    """Reads config.json, whose RoPE stands once for layers with a window and once for those without."""
    positions = hf.get("max_position_embeddings", 131_072)
    rope, local_rope = (
        read_rope({"rope_parameters": _spelled(hf, kind)}, positions)
        for kind in ("full_attention", "sliding_attention")
    )
    only = {**UNSUPPORTED, "attn_logit_softcapping": None}
    c = gemma({"max_position_embeddings": positions, **hf}, only, hf.get("sliding_window_pattern", 6), rope)
    return dataclasses.replace(c, local_rope=local_rope)


def write_config(hf: Mapping[str, Any]) -> dict[str, Any]:
    """The config with RoPE spelled for transformers 4 and 5, as models/config.py's for the other families."""
    full, local = (_spelled(hf, "full_attention"), _spelled(hf, "sliding_attention"))
    scaling = {key: value for key, value in full.items() if key != "rope_theta"}
    return {
        **hf,
        "rope_theta": full["rope_theta"],
        "rope_local_base_freq": local["rope_theta"],
        "rope_scaling": None if full["rope_type"] == "default" else scaling,
        "rope_parameters": {"full_attention": full, "sliding_attention": local},
    }


def _spelled(hf: Mapping[str, Any], kind: str) -> dict[str, Any]:
    """The rope_parameters of one kind of layer, from either schema."""
    if kind == "full_attention":
        old = {"rope_theta": hf.get("rope_theta", _THETA), **(hf.get("rope_scaling") or {})}
    else:
        old = {"rope_theta": hf.get("rope_local_base_freq", _LOCAL_THETA)}
    values = {**old, **((hf.get("rope_parameters") or {}).get(kind) or {})}
    return {"rope_type": values.pop("type", "default"), **values}


def block(
    x: Float[Array, "B T D"], w: Block, angles: Angles, attend: Attend, c: Config, project: Projection = projection
) -> tuple[Float[Array, "B T D"], Any]:
    """One layer. Returns its output and whatever `attend` keeps (a cache when sampling)."""
    h = offset_norm(x, w.attn_norm, c.norm_eps)
    q = offset_norm(project("BTD,DNH->BTNH", h, w.w_q), w.q_norm, c.norm_eps)
    k = offset_norm(project("BTD,DKH->BTKH", h, w.w_k), w.k_norm, c.norm_eps)
    v = project("BTD,DKH->BTKH", h, w.w_v)
    out, kept = attend(apply_rope(q, angles), apply_rope(k, angles), v)
    x = x + offset_norm(project("BTNH,NHD->BTD", out, w.w_o), w.attn_out_norm, c.norm_eps)
    return mlp(x, w, c, project), kept
