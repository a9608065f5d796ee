"""Gemma 2: norms before and after attention and MLP, soft caps, and a window in every other layer."""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from flax import struct
from jaxtyping import Array, Float

from jaxdistill.errors import UserError
from jaxdistill.models.attention import Attend
from jaxdistill.models.config import Config, Rope, read_config
from jaxdistill.models.layers import Angles, Projection, apply_rope, offset_norm, projection, swiglu
from jaxdistill.weights import Weight, weight, zeros

UNSUPPORTED = {"hidden_activation": "gelu_pytorch_tanh", "attention_bias": False, "use_bidirectional_attention": False}
gelu = functools.partial(jax.nn.gelu, approximate=True)


@struct.dataclass
class Block:
    """Weights of all layers, stacked on L."""

    attn_norm: Weight = weight("LM", "model.layers.{}.input_layernorm.weight", init=zeros)
    w_q: Weight = weight("LDNH", "model.layers.{}.self_attn.q_proj.weight", "(N H) D")
    w_k: Weight = weight("LDKH", "model.layers.{}.self_attn.k_proj.weight", "(K H) D")
    w_v: Weight = weight("LDKH", "model.layers.{}.self_attn.v_proj.weight", "(K H) D")
    w_o: Weight = weight("LNHD", "model.layers.{}.self_attn.o_proj.weight", "D (N H)")
    attn_out_norm: Weight = weight("LM", "model.layers.{}.post_attention_layernorm.weight", init=zeros)
    mlp_norm: Weight = weight("LM", "model.layers.{}.pre_feedforward_layernorm.weight", init=zeros)
    w_gate: Weight = weight("LDF", "model.layers.{}.mlp.gate_proj.weight", "F D")
    w_up: Weight = weight("LDF", "model.layers.{}.mlp.up_proj.weight", "F D")
    w_down: Weight = weight("LFD", "model.layers.{}.mlp.down_proj.weight", "D F")
    mlp_out_norm: Weight = weight("LM", "model.layers.{}.post_feedforward_layernorm.weight", init=zeros)


def config(hf: Mapping[str, Any]) -> Config:
    """Reads config.json."""
    c = gemma({"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0, **hf}, UNSUPPORTED, every=2)
    return dataclasses.replace(c, score_cap=hf.get("attn_logit_softcapping", 50.0))


def gemma(hf: Mapping[str, Any], unsupported: Mapping[str, Any], every: int, rope: Rope | None = None) -> Config:
    """What the generations have in common; every so many layers one has no window, where config.json does not say."""
    c = read_config({"head_dim": 256, "tie_word_embeddings": True, **hf}, unsupported, rope)
    kinds: Sequence[str] = hf.get("layer_types") or [
        "sliding_attention" if (i + 1) % every else "full_attention" for i in range(c.layers)
    ]
    if unknown := set(kinds) - {"sliding_attention", "full_attention"}:
        raise UserError(f"config.json: layer_types has {sorted(unknown)}; implemented are sliding and full attention")
    if len(kinds) != c.layers:
        raise UserError(f"config.json: layer_types names {len(kinds)} layers of {c.layers}")
    window = hf.get("sliding_window", 4096)
    return dataclasses.replace(
        c,
        window=window or 0,
        windowed=tuple(bool(window) and kind == "sliding_attention" for kind in kinds),
        score_scale=float(hf.get("query_pre_attn_scalar", 256)) ** -0.5,
        logit_cap=hf.get("final_logit_softcapping"),
        embed_scale=c.embed**0.5,
        offset_norms=True,
    )


def block(
    x: Float[Array, "B T D"], w: Any, angles: Angles, attend: Attend, c: Config, project: Projection = projection
) -> tuple[Float[Array, "B T D"], Any]:
    """One layer. Returns its output and whatever `attend` keeps (a cache when sampling)."""
    h = offset_norm(x, w.attn_norm, c.norm_eps)
    q = project("BTD,DNH->BTNH", h, w.w_q)
    k = project("BTD,DKH->BTKH", h, w.w_k)
    v = project("BTD,DKH->BTKH", h, w.w_v)
    out, kept = attend(apply_rope(q, angles), apply_rope(k, angles), v)
    x = x + offset_norm(project("BTNH,NHD->BTD", out, w.w_o), w.attn_out_norm, c.norm_eps)
    return mlp(x, w, c, project), kept


def mlp(x: Float[Array, "B T D"], w: Any, c: Config, project: Projection) -> Float[Array, "B T D"]:
    """The second half of a layer."""
    h = swiglu(offset_norm(x, w.mlp_norm, c.norm_eps), w, project, gelu)
    return x + offset_norm(h, w.mlp_out_norm, c.norm_eps)
