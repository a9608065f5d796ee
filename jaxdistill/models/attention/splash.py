"""The backend of TPUs: tokamax's splash attention, which computes a row's scores tile by tile."""

import importlib.util
import itertools
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxdistill.models.attention import OUTPUT_NAME, PLAIN, Scores

HEAD_DIMS = (64, 128)  # those that the kernel was compiled for
_BLOCK = 1024  # positions of queries and of keys in a tile; tiles of 2048 do not fit a TPU's VMEM
_LANES = 128  # a tile's sides are multiples of it
_INTERPRET = False  # tests set it: a CPU works through the kernel step by step


def attend(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    segments: Int[Array, "B S"],
    order: Int[np.ndarray, "R c t"],
    shard: int | Int[Array, ""],
    scores: Scores = PLAIN,
) -> Float[Array, "B T N H"]:
    """Attention of one device's queries. Arguments as of `blockwise.attend`; `misfit` says which lengths are possible.

    Rows are worked off one after another: the kernel skips a tile only if no row of its batch needs it.
    """
    kernel, segment_ids = _kernel(order, shard)
    query_segments = segments[:, jnp.asarray(order)[shard].ravel()]

    def one_row(row: tuple[Array, ...]) -> Array:
        q, k, v, query_segments, segments = row
        q_NTH, k_KSH, v_KSH = (x.swapaxes(0, 1) for x in (q * scores.scale_of(q.shape[-1]), k, v))
        return kernel(q_NTH, k_KSH, v_KSH, segment_ids=segment_ids(query_segments, segments)).swapaxes(0, 1)

    return jax.lax.map(one_row, (q, k, v, query_segments, segments))


def _tokamax() -> tuple[Any, Any]:
    """tokamax's kernel and its masks: private modules, at the same place in 0.0.12 and in 0.0.17.

    0.0.12, the last for Python 3.11, computes the tiles of other documents and masks them; from 0.0.16 on they are
    skipped.
    """
    if sys.version_info < (3, 12) and "tokamax" not in sys.modules:
        # A package that was found, but not run: it would need typeguard 2.13.3, which tyro does not go with. The kernel
        # itself needs jax alone.
        spec: Any = importlib.util.find_spec("tokamax")
        sys.modules["tokamax"] = importlib.util.module_from_spec(spec)
    from tokamax._src.ops.experimental.tpu.splash_attention import (  # pyright: ignore[reportMissingImports]
        splash_attention_kernel,
        splash_attention_mask,
    )

    return splash_attention_kernel, splash_attention_mask


def _kernel(order: np.ndarray, shard: int | Array) -> tuple[Any, Any]:
    """The kernel with this shard's schedule of tiles, which saves for the backward pass under OUTPUT_NAME."""
    kernels, masks = _tokamax()
    block = _block(order.size, order.shape[2])
    inner = block // 2 if block % (2 * _LANES) == 0 else block  # keys at a time, within a tile
    config = kernels.SplashConfig(
        block_q=block,
        block_kv=block,
        block_kv_compute=inner,
        block_q_dkv=block,
        block_kv_dkv=block,
        block_kv_dkv_compute=inner,
        dq_reduction_steps=3,  # buffers of query gradients; by default one for each block of keys
        residual_checkpoint_name=OUTPUT_NAME,
        interpret=_INTERPRET,
    )
    mask = masks.CausalMask((order.size, order.size))
    mask.q_sequence = order.ravel().astype(np.int32)
    kernel = kernels.make_splash_mha(mask, config=config, q_seq_shards=len(order))
    # The schedules of all shards stand one after another, made to be cut by shard_map; here this device takes its own
    kernel = jax.tree.map(lambda x: x.reshape(len(order), -1)[shard], kernel)
    return kernel, kernels.SegmentIds


def _block(length: int, stretch: int) -> int:
    """Positions on a side of a tile, for rows of a length whose queries stand in stretches of consecutive ones.

    A row has at least four blocks of keys. With fewer than three, 0.0.12's backward pass reads the sums that one query
    head leaves to the next of its group before they are written, without an error (with one, gradients of keys are off
    by 72% in a simulated TPU); 0.0.17 tells of it and works around it.
    """
    return min(_BLOCK, length // 4, stretch)


def misfit(length: int, chunks: int, head_dim: int) -> str | None:
    """Why the kernel cannot compute rows of a length that are cut into so many chunks, or None."""
    if head_dim not in HEAD_DIMS:
        return f"head_dim is {head_dim}, splash is known to work with {' and '.join(map(str, HEAD_DIMS))}"

    def fits(length: int) -> bool:
        stretch, rest = divmod(length, chunks)
        block = _block(length, stretch)
        return not rest and block >= _LANES and not block % _LANES and not stretch % block

    if not fits(length):
        longer = next(n for n in itertools.count(length) if fits(n))
        return f"splash cannot cut rows of {length} tokens into tiles; the next row_tokens that it can is {longer}"
    return None
