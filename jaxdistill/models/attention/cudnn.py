"""The backend of Hopper GPUs: cuDNN's attention over sequences of different lengths that lie packed in memory (THD)."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from jaxdistill.models.attention import OUTPUT_NAME, PLAIN, Scores

_MOST_ELEMENTS = 2**31  # of q on a device: cuDNN is given the place of each document in int32


def attend(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    segments: Int[Array, "B T"],
    order: Int[np.ndarray, "1 1 T"],
    shard: int,
    *,
    most: int,
    scores: Scores = PLAIN,
) -> Float[Array, "B T N H"]:
    """Attention over whole rows, in bfloat16. Other arguments as of `blockwise.attend`.

    Args:
      most: documents of a row at most, its padding counted as one; what a row holds beyond them would not be computed.
        The statistics of the softmax are [B most, N, T].
    """
    del order, shard  # the positions as they are, of the only device that holds the row
    lengths, starts = documents(segments, most)
    q_offsets, k_offsets = (starts * x.shape[2] * x.shape[3] for x in (q, k))  # in elements
    return _packed(q, k, v, lengths, q_offsets, k_offsets, scores.scale_of(q.shape[-1]))


def documents(segments: Int[Array, "B T"], most: int) -> tuple[Int[Array, "B most"], Int[Array, "B most+1"]]:
    """Length and first position of every document, of all rows one after another.

    Both are lists without gaps that go on from line to line. Unused lengths are 0, unused starts B T, the end of the
    last row; of these there is always one.
    """
    B, T = segments.shape
    begins = jnp.pad(segments[:, 1:] != segments[:, :-1], ((0, 0), (1, 0)), constant_values=True)
    starts = jnp.nonzero(begins.ravel(), size=B * (most + 1), fill_value=B * T)[0].astype(jnp.int32)
    lengths = jnp.diff(starts)[: B * most]
    return lengths.reshape(B, most), starts.reshape(B, most + 1)


@functools.partial(jax.custom_vjp, nondiff_argnums=(6,))
def _packed(q: Array, k: Array, v: Array, lengths: Array, q_offsets: Array, k_offsets: Array, scale: float) -> Array:
    return _forward(q, k, v, lengths, q_offsets, k_offsets, scale)[0]


def _forward(
    q: Array, k: Array, v: Array, lengths: Array, q_offsets: Array, k_offsets: Array, scale: float
) -> tuple[Array, Any]:
    none, settings, primitives = _settings(q, scale)
    packing = (lengths, lengths, q_offsets, k_offsets)
    out, statistics = primitives._dot_product_attention_fwd_p.bind(
        q, k, v, none, *packing, none, none, **settings, is_training=True
    )
    # With both of these saved, the backward pass need not run the forward one again
    out, statistics = checkpoint_name(out, OUTPUT_NAME), checkpoint_name(statistics, OUTPUT_NAME)
    return out, (q, k, v, packing, statistics, out)


def _backward(scale: float, residuals: Any, d_out: Array) -> tuple[Array | None, ...]:
    q, k, v, packing, statistics, out = residuals
    none, settings, primitives = _settings(q, scale)
    d_qkv = primitives._dot_product_attention_bwd_p.bind(
        q, k, v, none, *packing, none, none, statistics, out, d_out, **settings
    )
    return (*d_qkv, None, None, None)


_packed.defvjp(_forward, _backward)


def _settings(q: Array, scale: float) -> tuple[Array, dict[str, Any], Any]:
    """What stands for absent arguments, the parameters of both primitives, and the module that has them.

    The primitives are those that become cuDNN's custom calls. jax's own functions around them would compute the
    offsets, in jax 0.10 with q's heads for k and v too: with fewer key/value heads than query heads that gives wrong
    numbers without an error (fixed by jax-ml/jax#39521). They also ask the GPU at hand, where there may be none.
    """
    from jax._src.cudnn import fused_attention_stablehlo

    settings = {
        "scale": scale,
        "seed": 0,
        "dropout_rate": 0.0,
        "variadic_args": (False, False),  # no bias, and no gradient of one
        "mask_type": fused_attention_stablehlo.MaskType.PADDING_CAUSAL,
        "layout": fused_attention_stablehlo.AttentionLayout.BTNH.value,
        "sliding_window_length": None,
    }
    if jax.__version_info__ >= (0, 12):
        settings |= {"score_mod_name": None, "score_mod_jaxpr": None}  # scores as they are
    return jnp.zeros(0, q.dtype), settings, fused_attention_stablehlo


def misfit(rows: int, row_tokens: int, heads: int, head_dim: int, dtype: str) -> str | None:
    """Why cuDNN cannot compute so many whole rows with so many query heads at a time, or None."""
    if dtype != "bfloat16":
        return f"step.compute_dtype is {dtype}, cudnn computes in bfloat16"
    if head_dim > 256 or head_dim % 8:
        return f"head_dim is {head_dim}, cudnn needs a multiple of 8 up to 256"
    elements = rows * row_tokens * heads * head_dim
    if elements >= _MOST_ELEMENTS:
        return (
            f"{rows} rows x {row_tokens} tokens x {heads} heads x {head_dim} are {elements} elements on a device, but "
            f"cudnn can address {_MOST_ELEMENTS}; raise step.accumulate, mesh.tensor or mesh.context"
        )
    return None
