"""The layers that the model families share."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from jaxdistill.models.config import Rope
from jaxdistill.sharding import einsum, gather, spec
from jaxdistill.weights import Weight

_STRETCH = 16_384  # positions on one device that the MLP works on at a time, where rows are more than twice as long

PROJECTION_NAME = "projection"  # remat policies know a projection's result by this name
Projection = Callable[[str, Array, Any], Array]  # as `projection`; models/quantized.py has others


def projection(equation: str, x: Array, w: Array) -> Array:
    """Activations times a stored weight, which is gathered in their dtype, by an equation such as "BTD,DF->BTF"."""
    return checkpoint_name(matmul(equation, x, w), PROJECTION_NAME)


def matmul(equation: str, x: Array, w: Array) -> Array:
    """As `projection`, and linear in `w` for jax too."""
    dims = equation.split("->")[0].split(",")[1]
    return einsum(equation, x, gather(w, dims, x.dtype))


def rms_norm(x: Float[Array, "*dims C"], scale: Float[Array, " C"], eps: float) -> Float[Array, "*dims C"]:
    """Root-mean-square norm over the last dimension, in float32."""
    x32 = x.astype(jnp.float32)
    x32 = x32 * jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + eps)
    return scale.astype(x.dtype) * x32.astype(x.dtype)


def rms_norm32(
    x: Float[Array, "*dims C"], scale: Float[Array, "..."], eps: float, axes: tuple[int, ...] = (-1,)
) -> Float[Array, "*dims C"]:
    """As `rms_norm`, scaled before it is rounded, as OLMo 2 and Gemma do it; over the dimensions `axes`."""
    x32 = x.astype(jnp.float32)
    x32 = x32 * jax.lax.rsqrt(jnp.mean(x32 * x32, axis=axes, keepdims=True) + eps)
    return (scale.astype(jnp.float32) * x32).astype(x.dtype)


def offset_norm(x: Float[Array, "*dims C"], scale: Float[Array, " C"], eps: float) -> Float[Array, "*dims C"]:
    """Gemma's: weights say how far the scale is from 1."""
    return rms_norm32(x, 1 + scale.astype(jnp.float32), eps)


def capped(x: Float[Array, "*dims"], cap: float | None) -> Float[Array, "*dims"]:
    """Soft cap: no value is larger than it; None leaves all as they are."""
    return x if cap is None else cap * jnp.tanh(x / cap)


Angles = tuple[Float[Array, "B T H2"], Float[Array, "B T H2"]]  # cos and sin; H2 = H / 2


def rope_angles(positions: Int[Array, "B T"], rope: Rope, head_dim: int) -> Angles:
    """Cos and sin of each position's rotations, computed once for all layers.

    Positions count from 0 within a packed document. Angles are float32: bfloat16 would round position 257 to 256.
    """
    angle = positions[..., None].astype(jnp.float32) * inverse_frequencies(rope, head_dim)
    return jnp.cos(angle) * rope.attention_factor, jnp.sin(angle) * rope.attention_factor


def apply_rope(x: Float[Array, "B T N H"], angles: Angles) -> Float[Array, "B T N H"]:
    """Rotates each pair (i, i + H/2), as transformers' Llama does; float32 inside."""
    cos, sin = (a[:, :, None, :] for a in angles)
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)


def inverse_frequencies(rope: Rope, head_dim: int) -> np.ndarray:
    """Radians per position for each of the H/2 pairs, float32 [H/2].

    Rounded to float32 in the same places as transformers, which the checkpoints were trained with: half a unit in
    the last place is 1e-4 radians at position 4,096, and shows in the logits.

    Sources: transformers `modeling_rope_utils.py` (`_compute_llama3_parameters`, `_compute_yarn_parameters`).
    """
    exponents = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    periods = (rope.theta ** exponents.astype(np.float64)).astype(np.float32)
    frequencies = 1 / periods
    if rope.kind == "linear":
        frequencies = frequencies / np.float32(rope.factor)
    elif rope.kind == "llama3":
        wavelengths = 2 * math.pi / frequencies
        low, high = rope.low_freq_factor, rope.high_freq_factor
        smooth = np.clip((rope.original_positions / wavelengths - low) / (high - low), 0.0, 1.0)
        frequencies = (1 - smooth) * frequencies / rope.factor + smooth * frequencies
    elif rope.kind == "yarn":
        low, high = _yarn_range(rope, head_dim)
        ramp = np.clip((np.arange(head_dim // 2, dtype=np.float32) - low) / (high - low), 0.0, 1.0)
        extrapolated = 1 - ramp
        frequencies = 1 / (rope.factor * periods) * (1 - extrapolated) + frequencies * extrapolated
    return frequencies.astype(np.float32)


def _yarn_range(rope: Rope, head_dim: int) -> tuple[float, float]:
    """The pairs between which YaRN goes over from extrapolation to interpolation."""

    def pair(rotations: float) -> float:
        turns = rope.original_positions / (rotations * 2 * math.pi)
        return head_dim * math.log(turns) / (2 * math.log(rope.theta))

    low, high = pair(rope.beta_fast), pair(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = float(max(low, 0)), float(min(high, head_dim - 1))
    return low, high + 0.001 if low == high else high


def swiglu(
    x: Float[Array, "B T D"], w: Any, project: Projection, activation: Callable[[Array], Array] = jax.nn.silu
) -> Float[Array, "B T D"]:
    """The gated MLP of all families; `w` is a block with w_gate, w_up and w_down."""

    def mlp(x: Array, w_gate: Weight, w_up: Weight, w_down: Weight) -> Array:
        gate, up = project("BTD,DF->BTF", x, w_gate), project("BTD,DF->BTF", x, w_up)
        return project("BTF,FD->BTD", activation(gate) * up, w_down)

    return by_stretches(mlp, x, w.w_gate, w.w_up, w.w_down)


def by_stretches(f: Callable[..., Array], x: Any, *weights: Weight) -> Float[Array, "B T E"]:
    """f(x, *weights), which treats each position by itself: one stretch of a very long row after the other.

    x is an array [B, T, D], or several of them.

    So what f computes on its way, stored weights that it gathers included, is never held for more than `_STRETCH`
    positions; the backward pass computes it again, whatever the remat policy would keep. Gradients of the weights are
    added up in float32: a scan adds them up in the dtype of what it is given. Rows that do not come apart evenly stay
    whole.
    """
    shards = jax.sharding.get_abstract_mesh().shape["context"]
    B, T = jax.tree.leaves(x)[0].shape[:2]
    pieces = _pieces(T // shards)
    if pieces == 1:
        return f(x, *weights)
    wide = jax.tree.map(lambda w: w.astype(jnp.float32) if jnp.issubdtype(w.dtype, jnp.floating) else w, weights)

    @jax.checkpoint
    def stretch(x: Any, wide: tuple[Any, ...]) -> Array:
        return f(x, *jax.tree.map(lambda w, stored: w.astype(stored.dtype), wide, weights))

    # [B, T, D] -> [pieces, B, T / pieces, D], each device's positions for themselves
    def split(x: Array) -> Array:
        cut = (B, shards, pieces, T // shards // pieces, x.shape[-1])
        parts = jnp.moveaxis(jax.lax.reshape(x, cut, out_sharding=spec("BTstD")), 2, 0)
        return jax.lax.reshape(parts, (pieces, B, T // pieces, x.shape[-1]), out_sharding=spec("sBTD"))

    _, ys = jax.lax.scan(lambda _, x: (None, stretch(x, wide)), None, jax.tree.map(split, x))
    parts = jax.lax.reshape(ys, (pieces, B, shards, T // shards // pieces, ys.shape[-1]), out_sharding=spec("sBTtD"))
    return jax.lax.reshape(jnp.moveaxis(parts, 0, 2), (B, T, ys.shape[-1]), out_sharding=spec("BTD"))


def _pieces(positions: int) -> int:
    """Into how many even stretches a device's positions of a row are cut."""
    if positions <= 2 * _STRETCH:
        return 1
    fewest = -(-positions // _STRETCH)
    return next((n for n in range(fewest, 32 * fewest) if positions % n == 0), 1)
