"""Cross-entropy whose logits never exist for more than a chunk of tokens."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxdistill.models.layers import capped
from jaxdistill.sharding import STORAGE, gather, spec

_CHUNK_LOGITS = 16 * 1024 * 1024  # logits alive at once on a device: 64 MiB in float32


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def cross_entropy_sum(
    x: Float[Array, "B T D"],
    w: Float[Array, "V D"],
    targets: Int[Array, "B T"],
    weights: Float[Array, "B T"],
    cap: float | None = None,
) -> Float[Array, ""]:
    """Sum over tokens of weight x negative log-likelihood, float32; divide by the global sum of weights.

    The gradients come out of the same pass over chunks of tokens as the loss: the head's is accumulated in float32
    (a scan that accumulates it in bfloat16 loses three digits) and leaves reduce-scattered in storage layout.

    Args:
      x: hidden states, in compute dtype.
      w: the head in storage layout; it is cast to x's dtype and gathered here.
      cap: soft cap of the logits.
    """
    return _over_chunks(x, w, targets, weights, cap, gradients=False)[0]


def _forward(
    x: Array, w: Array, targets: Array, weights: Array, cap: float | None
) -> tuple[Array, tuple[Array, Array, Array]]:
    loss, dx, dw = _over_chunks(x, w, targets, weights, cap, gradients=True)
    return loss, (dx, dw.astype(w.dtype), targets)


def _backward(cap: float | None, residuals: tuple[Array, Array, Array], g: Array) -> tuple[Array, Array, Any, None]:
    dx, dw, targets = residuals
    return (dx * g).astype(dx.dtype), (dw * g).astype(dw.dtype), np.zeros(targets.shape, jax.dtypes.float0), None


cross_entropy_sum.defvjp(_forward, _backward)


def _over_chunks(
    x: Array, w: Array, targets: Array, weights: Array, cap: float | None, gradients: bool
) -> tuple[Array, ...]:
    gathered = jax.sharding.reshard(gather(w, "VD", x.dtype), spec("VD"))  # not `reduced`: gradients are made below
    token = spec("BT")
    outputs = (jax.P(), spec("BTD"), spec("VD", STORAGE)) if gradients else (jax.P(),)
    return jax.shard_map(
        functools.partial(_local, cap=cap, gradients=gradients),
        in_specs=(spec("BTD"), spec("VD"), token, token),
        out_specs=outputs,
        check_vma=False,
    )(x, gathered, targets, weights)


def _local(x: Array, w: Array, targets: Array, weights: Array, cap: float | None, gradients: bool) -> tuple[Array, ...]:
    """One device's tokens against its slice of the vocabulary."""
    tokens, V = targets.size, w.shape[0]
    # Half a row at most: however small the vocabulary, the logits of a row never exist at once
    chunk = min(-(-targets.shape[1] // 2), max(128, _CHUNK_LOGITS // V))
    chunks = -(-tokens // chunk)
    padding = chunks * chunk - tokens  # padded tokens weigh nothing

    def split(a: Array) -> Array:
        flat = a.reshape(tokens, *a.shape[2:])
        return jnp.pad(flat, [(0, padding)] + [(0, 0)] * (flat.ndim - 1)).reshape(chunks, chunk, *flat.shape[1:])

    first_id = jax.lax.axis_index("tensor") * V

    def body(carry: tuple[Array, Array], piece: tuple[Array, Array, Array]) -> tuple[tuple[Array, Array], Array]:
        loss, dw = carry
        x_CD, target_C, weight_C = piece
        logits_CV = capped(jnp.einsum("CD,VD->CV", x_CD, w, preferred_element_type=jnp.float32), cap)
        top_C = jax.lax.pmax(logits_CV.max(-1), "tensor")
        exp_CV = jnp.exp(logits_CV - top_C[:, None])
        total_C = jax.lax.psum(exp_CV.sum(-1), "tensor")
        hit_CV = (target_C - first_id)[:, None] == jnp.arange(V)
        chosen_C = jax.lax.psum(jnp.sum(jnp.where(hit_CV, logits_CV, 0.0), -1), "tensor")
        loss += jnp.sum(weight_C * (jnp.log(total_C) + top_C - chosen_C))
        if not gradients:
            return (loss, dw), jnp.zeros(())
        g_CV = (exp_CV / total_C[:, None] - hit_CV) * weight_C[:, None]
        if cap is not None:
            g_CV *= 1 - jnp.square(logits_CV / cap)  # the slope of tanh
        g_CV = g_CV.astype(x.dtype)
        dx_CD = jnp.einsum("CV,VD->CD", g_CV, w, preferred_element_type=jnp.float32)
        dw += jnp.einsum("CV,CD->DV", g_CV, x_CD, preferred_element_type=jnp.float32)
        return (loss, dw), jax.lax.psum(dx_CD, "tensor").astype(x.dtype)

    start = (jnp.zeros(()), jnp.zeros(w.shape[::-1] if gradients else (), jnp.float32))
    (loss, dw), dx = jax.lax.scan(body, start, (split(x), split(targets), split(weights)))
    loss = jax.lax.psum(loss, ("data", "fsdp", "context"))
    if not gradients:
        return (loss,)
    dx = dx.reshape(-1, x.shape[-1])[:tokens].reshape(x.shape)
    dw = dw.reshape(jax.lax.axis_size("fsdp"), jax.lax.axis_size("context"), -1, V)
    for axis in ("fsdp", "context"):
        dw = jax.lax.psum_scatter(dw, axis)
    return loss, dx, jax.lax.psum(dw, "data").T
