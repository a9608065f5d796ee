"""Phi-3 and Phi-4: Llama with one tensor for queries, keys and values, and one for both halves of the gated MLP."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from flax import struct

from jaxdistill.models.config import Config, read_config
from jaxdistill.models.llama import block
from jaxdistill.weights import Weight, ones, weight

__all__ = ["Block", "block", "config"]

_QKV = "model.layers.{}.self_attn.qkv_proj.weight"
_GATE_UP = "model.layers.{}.mlp.gate_up_proj.weight"


@struct.dataclass
class Block:
    """Weights of all layers, stacked on L; those that name the same tensor lie in it one after another."""

    attn_norm: Weight = weight("LM", "model.layers.{}.input_layernorm.weight", init=ones)
    w_q: Weight = weight("LDNH", _QKV, "(N H) D")
    w_k: Weight = weight("LDKH", _QKV, "(K H) D")
    w_v: Weight = weight("LDKH", _QKV, "(K H) D")
    w_o: Weight = weight("LNHD", "model.layers.{}.self_attn.o_proj.weight", "D (N H)")
    mlp_norm: Weight = weight("LM", "model.layers.{}.post_attention_layernorm.weight", init=ones)
    w_gate: Weight = weight("LDF", _GATE_UP, "F D")
    w_up: Weight = weight("LDF", _GATE_UP, "F D")
    w_down: Weight = weight("LFD", "model.layers.{}.mlp.down_proj.weight", "D F")


def config(hf: Mapping[str, Any]) -> Config:
    """Reads config.json. The versions with long positions (longrope) are refused."""
    rope = hf.get("rope_parameters") or {}
    partial = {"partial_rotary_factor": rope.get("partial_rotary_factor", hf.get("partial_rotary_factor", 1.0))}
    only = {"hidden_act": "silu", "partial_rotary_factor": 1.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0}
    c = read_config({"rms_norm_eps": 1e-5, **hf, **partial}, unsupported=only)
    window = hf.get("sliding_window")
    return dataclasses.replace(c, window=window, windowed=(True,) * c.layers) if window else c
