"""Attention to pages for TPUs: one kernel, by Pallas, that copies pages into VMEM while it computes with the last ones.

XLA would copy every page within HBM before it multiplies with it: three times the bytes.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu
from jaxtyping import Array, Float, Int

from jaxdistill.models.attention import Scores
from jaxdistill.models.layers import capped
from jaxdistill.sample.triton import MASKED, Sums

_BUFFER_BYTES = 2**22  # keys and values under way, and as many that are computed with; of some 16 MiB of VMEM
_QUERIES = 256  # of a tile at most
_LANES, _SUBLANES = 128, 16  # sides of a bfloat16 tile of VMEM; heads fill lanes
INTERPRET: Any = False  # tests set it: a CPU simulates a TPU's memory, step by step


def misfit(head_dim: int, page_tokens: int, cache_dtype: str = "compute") -> str | None:
    """Why the kernel cannot compute heads or pages of a size, or in a dtype, or None.

    Args:
      page_tokens: positions of a page on one device.
    """
    if cache_dtype != "compute":
        return f"cache_dtype: {cache_dtype}, and mosaic reads keys and values as they are computed with"
    sides = (("head_dim", head_dim, _LANES), ("a page's positions on one device", page_tokens, _SUBLANES))
    for what, size, unit in sides:
        if size % unit:
            return f"{what}: {size}, and mosaic needs a multiple of {unit}"
    return None


def sums(
    q: Float[Array, "B K X H"],
    pages: tuple[Array, Array, None, None],
    tables: Int[Array, "B M"],
    last: Int[Array, "B X"],
    bounds: tuple[Int[Array, " B"], Int[Array, " B"]],
    stride: int,
    scores: Scores,
    window: int | None,
) -> Sums:
    """What `triton.sums` gives, in one stretch; see there."""
    keys, values, *_ = pages
    (B, K, X, H), p = q.shape, keys.shape[2]
    tile = min(_QUERIES, pl.cdiv(X, _SUBLANES) * _SUBLANES)
    rows = pl.cdiv(X, tile) * tile
    q = jnp.pad(q, ((0, 0), (0, 0), (0, rows - X), (0, 0)))
    last = jnp.pad(last, ((0, 0), (0, rows - X)), mode="edge")[..., None]
    together = max(1, min(tables.shape[1], _BUFFER_BYTES // (2 * 2 * K * p * H * keys.dtype.itemsize)))
    of_queries = lambda *more: pl.BlockSpec((None, K, tile, *more), lambda b, x, *_: (b, 0, x, 0))  # noqa: E731
    buffer = tpu.VMEM((2, together, K, p, H), keys.dtype)
    tops, totals, seen = pl.pallas_call(
        functools.partial(_kernel, stride=stride, scale=scores.scale_of(H), cap=scores.cap, window=window),
        grid_spec=tpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=3,
            grid=(B, rows // tile),
            in_specs=[
                pl.BlockSpec((None, tile, 1), lambda b, x, *_: (b, x, 0)),
                of_queries(H),
                pl.BlockSpec(memory_space=pl.ANY),
                pl.BlockSpec(memory_space=pl.ANY),
            ],
            out_specs=[of_queries(_LANES), of_queries(_LANES), of_queries(H)],
            scratch_shapes=[buffer, buffer, tpu.SemaphoreType.DMA((2, 2))],
        ),
        out_shape=[jax.ShapeDtypeStruct((B, K, rows, width), jnp.float32) for width in (_LANES, _LANES, H)],
        compiler_params=tpu.CompilerParams(dimension_semantics=("parallel", "parallel")),
        interpret=INTERPRET,
        name="attention_to_pages",
    )(tables, *bounds, last, q, keys, values)
    return tops[:, :, None, :X, 0], totals[:, :, None, :X, 0], seen[:, :, None, :X]


def _kernel(
    tables: Any,  # [B, M]
    first: Any,  # [B]
    end: Any,  # [B]
    last: Any,  # [x, 1]
    queries: Any,  # [K, x, H]
    keys: Any,  # [P, K, p, H] in HBM
    values: Any,  # [P, K, p, H] in HBM
    tops: Any,  # [K, x, lanes]
    totals: Any,  # [K, x, lanes]
    seen: Any,  # [K, x, H]
    key_buffer: Any,  # [2, n, K, p, H]
    value_buffer: Any,
    arrived: Any,  # semaphores [2, 2]: keys or values, and which half of the buffer
    *,
    stride: int,
    scale: float,
    cap: float | None,
    window: int | None,
) -> None:
    """One tile of queries of a row against all of the row's pages, n at a time."""
    row = pl.program_id(0)
    (_, n, heads, p, H), x = key_buffer.shape, queries.shape[1]
    start, stop = first[row], end[row]
    groups = jnp.maximum(pl.cdiv(stop - start, n), 0)

    def copies(group: Array, half: Array) -> list[Any]:
        made = []
        for j in range(n):
            page = tables[row, jnp.minimum(start + group * n + j, stop - 1)]  # past the end: masked
            made.append(tpu.make_async_copy(keys.at[page], key_buffer.at[half, j], arrived.at[0, half]))
            made.append(tpu.make_async_copy(values.at[page], value_buffer.at[half, j], arrived.at[1, half]))
        return made

    @pl.when(groups > 0)
    def _() -> None:
        for copy in copies(jnp.int32(0), jnp.int32(0)):
            copy.start()

    last_x1 = last[...]

    def body(group: Array, carry: Any) -> Any:
        half = group % 2

        @pl.when(group + 1 < groups)
        def _() -> None:
            for copy in copies(group + 1, 1 - half):
                copy.start()

        for copy in copies(group, half):
            copy.wait()
        index = jax.lax.broadcasted_iota(jnp.int32, (x, n * p), 1)
        number = start + group * n + index // p
        positions = number * stride + index % p
        visible = (number < stop) & (positions <= last_x1)
        if window is not None:
            visible &= positions > last_x1 - window
        found = []
        for head, (top, total, sums) in enumerate(carry):
            # Online softmax; weights of what is not seen are 0, whatever the largest score so far
            q_xH = queries[head]
            k_tH, v_tH = (b[half, :, head].reshape(n * p, H).astype(q_xH.dtype) for b in (key_buffer, value_buffer))
            scores = jax.lax.dot_general(q_xH, k_tH, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32)
            scores = jnp.where(visible, capped(scores * scale, cap), MASKED)
            new_top = jnp.maximum(top, scores.max(-1, keepdims=True))
            weights = jnp.where(visible, jnp.exp(scores - new_top), 0.0)
            shrink = jnp.exp(top - new_top)
            here = jax.lax.dot(weights.astype(q_xH.dtype), v_tH, preferred_element_type=jnp.float32)
            found.append((new_top, total * shrink + weights.sum(-1, keepdims=True), sums * shrink + here))
        return found

    blank = jnp.full((x, 1), MASKED, jnp.float32), jnp.zeros((x, 1), jnp.float32), jnp.zeros((x, H), jnp.float32)
    for head, (top, total, sums) in enumerate(jax.lax.fori_loop(0, groups, body, [blank] * heads)):
        tops[head], totals[head] = (jnp.broadcast_to(a, (x, _LANES)) for a in (top, total))
        seen[head] = sums
