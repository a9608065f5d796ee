"""The second backend of Hopper GPUs: tokamax's kernels in Mosaic, which know windows, soft caps and parts of rows."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from jaxdistill.models.attention import OUTPUT_NAME, PLAIN, Scores

HEAD_DIMS = (64, 128, 256)  # that the kernels were compiled for


def attend(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    segments: Int[Array, "B S"],
    order: Int[np.ndarray, "R c t"],
    shard: int | Int[Array, ""],
    scores: Scores = PLAIN,
    window: Int[Array, ""] | None = None,
) -> Float[Array, "B T N H"]:
    """Attention of one device's queries, in bfloat16. Arguments as of `blockwise.attend`.

    Each query is told the first key that it sees, and the last. The forward kernel skips tiles before and after those;
    the backward one only those behind the causal diagonal, and of a row that is split none.
    """
    S, positions = segments.shape[1], jnp.asarray(order)[shard].ravel()
    begins = jnp.pad(segments[:, 1:] != segments[:, :-1], ((0, 0), (1, 0)), constant_values=True)
    first = jax.lax.cummax(jnp.where(begins, jnp.arange(S), 0), axis=1)[:, positions]
    if window is not None:
        first = jnp.maximum(first, positions - window + 1)
    split = order.shape[0] > 1
    end = jnp.broadcast_to(positions + 1, first.shape) if split else None
    return _attend(q, k, v, first.astype(jnp.int32), end, scores)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def _attend(q: Array, k: Array, v: Array, first: Array, end: Array | None, scores: Scores) -> Array:
    return _forward(q, k, v, first, end, scores)[0]


def _forward(q: Array, k: Array, v: Array, first: Array, end: Array | None, scores: Scores) -> tuple[Array, Any]:
    forward, settings = _kernel(q, first, end, scores)
    out, (top, total) = forward(q, k, v, return_residuals=True, **settings)
    # With these saved, the backward pass need not run the forward kernel again
    out, top, total = (checkpoint_name(x, OUTPUT_NAME) for x in (out, top, total))
    return out, (q, k, v, first, end, out, (top, total))


def _backward(scores: Scores, residuals: Any, d_out: Array) -> tuple[Array | None, ...]:
    q, k, v, first, end, out, of_softmax = residuals
    forward, settings = _kernel(q, first, end, scores)
    bound = {**forward.bind(q, k, v, **settings).kwargs, "return_residuals": False}  # every argument spelled out
    found = forward.vjp(of_softmax, out, d_out, q, k, v, **bound)
    return found["q"], found["k"], found["v"], None, None


_attend.defvjp(_forward, _backward)


def _kernel(q: Array, first: Array, end: Array | None, scores: Scores) -> tuple[Any, dict[str, Any]]:
    """tokamax's operation, and what it and its `vjp`, the backward one, are told."""
    base, forward = _operations()
    mask = base.Mask(k_start=first[:, None], k_end=None if end is None else end[:, None], is_causal=end is None)
    settings = {"logits_scale": scores.scale_of(q.shape[-1]), "logits_soft_cap": scores.cap, "mask": mask}
    return forward, settings


def misfit(head_dim: int, dtype: str) -> str | None:
    """What the kernels cannot compute of a model, and what to do about it."""
    if dtype != "bfloat16":
        return f"step.compute_dtype is {dtype}, mosaic computes in bfloat16"
    if head_dim not in HEAD_DIMS:
        return f"head_dim is {head_dim}, mosaic is known to work with {', '.join(map(str, HEAD_DIMS))}; use cudnn"
    return None


def _operations() -> tuple[Any, Any]:
    """The module of masks and the operation; private ones, as of 0.0.16 and 0.0.17."""
    from tokamax._src.ops.attention import base, pallas_mosaic_gpu  # pyright: ignore[reportMissingImports]

    return base, pallas_mosaic_gpu.PallasMosaicGpuFlashAttention()
