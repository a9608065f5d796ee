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

_BUFFER_BYTES = 2**21  # keys and values under way, and as many that are computed with; of some 16 MiB of VMEM
_LANES, _SUBLANES = 128, 16  # sides of a bfloat16 tile of VMEM; heads fill lanes
MOST_NEW = 1  # tokens of a row; prefill multiplies so much that XLA's copies of pages cost little
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
    """What `triton.sums` gives, in one stretch, for the few queries of a decoding step; see there.

    A page's keys lie position by position, all heads of one together. To pick those of one head costs more than to
    multiply every query with all of them, and to mask the others.

    Args:
      pages: keys and values [P, p, K, H].
    """
    keys, values = (x.reshape(x.shape[0], -1, x.shape[-1]) for x in pages[:2])
    (B, K, X, H), of_page = q.shape, keys.shape[1]
    x = pl.cdiv(X, _SUBLANES) * _SUBLANES
    q = jnp.pad(q, ((0, 0), (0, 0), (0, x - X), (0, 0))).reshape(B, K * x, H)
    last = jnp.tile(jnp.pad(last, ((0, 0), (0, x - X)), mode="edge"), (1, K))[..., None]
    together = max(1, min(tables.shape[1], _BUFFER_BYTES // (2 * 2 * of_page * H * keys.dtype.itemsize)))
    of_queries = lambda width: pl.BlockSpec((None, K * x, width), lambda b, *_: (b, 0, 0))  # noqa: E731
    buffer = tpu.VMEM((2, together, of_page, H), keys.dtype)
    tops, totals, seen = pl.pallas_call(
        functools.partial(_kernel, heads=K, stride=stride, scale=scores.scale_of(H), cap=scores.cap, window=window),
        grid_spec=tpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=3,
            grid=(B,),
            in_specs=[
                of_queries(1),
                of_queries(H),
                pl.BlockSpec(memory_space=pl.ANY),
                pl.BlockSpec(memory_space=pl.ANY),
            ],
            out_specs=[of_queries(_LANES), of_queries(_LANES), of_queries(H)],
            scratch_shapes=[buffer, buffer, tpu.SemaphoreType.DMA((2, 2))],
        ),
        out_shape=[jax.ShapeDtypeStruct((B, K * x, width), jnp.float32) for width in (_LANES, _LANES, H)],
        compiler_params=tpu.CompilerParams(dimension_semantics=("parallel",)),
        interpret=INTERPRET,
        name="attention_to_pages",
    )(tables, *bounds, last, q, keys, values)
    tops, totals, seen = (a.reshape(B, K, 1, x, -1)[..., :X, :] for a in (tops, totals, seen))
    return tops[..., 0], totals[..., 0], seen


def _kernel(
    tables: Any,  # [B, M]
    first: Any,  # [B]
    end: Any,  # [B]
    last: Any,  # [K x, 1]
    queries: Any,  # [K x, H]
    keys: Any,  # [P, p K, H] in HBM
    values: Any,  # [P, p K, H] in HBM
    tops: Any,  # [K x, lanes]
    totals: Any,  # [K x, lanes]
    seen: Any,  # [K x, H]
    key_buffer: Any,  # [2, n, p K, H]
    value_buffer: Any,
    arrived: Any,  # semaphores [2, 2]: keys or values, and which half of the buffer
    *,
    heads: int,
    stride: int,
    scale: float,
    cap: float | None,
    window: int | None,
) -> None:
    """The queries of a row against all of the row's pages, n at a time."""
    row = pl.program_id(0)
    (_, n, of_page, H), q_qH = key_buffer.shape, queries[...]
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

    shape = q_qH.shape[0], n * of_page
    column = jax.lax.broadcasted_iota(jnp.int32, shape, 1)
    own = jax.lax.broadcasted_iota(jnp.int32, shape, 0) // (shape[0] // heads) == column % heads
    offset = column // of_page * stride + column % of_page // heads
    last_q1 = last[...]

    def body(group: Array, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        top, total, sums = carry
        half = group % 2

        @pl.when(group + 1 < groups)
        def _() -> None:
            for copy in copies(group + 1, 1 - half):
                copy.start()

        for copy in copies(group, half):
            copy.wait()
        # Online softmax; weights of what is not seen are 0, whatever the largest score so far
        number = start + group * n
        positions = number * stride + offset
        visible = own & (offset < (stop - number) * stride) & (positions <= last_q1)
        if window is not None:
            visible &= positions > last_q1 - window
        k_kH, v_kH = (b[half].reshape(n * of_page, H).astype(q_qH.dtype) for b in (key_buffer, value_buffer))
        scores = jax.lax.dot_general(q_qH, k_kH, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32)
        scores = jnp.where(visible, capped(scores * scale, cap), MASKED)
        new_top = jnp.maximum(top, scores.max(-1, keepdims=True))
        weights = jnp.where(visible, jnp.exp(scores - new_top), 0.0)
        shrink = jnp.exp(top - new_top)
        here = jax.lax.dot(weights.astype(q_qH.dtype), v_kH, preferred_element_type=jnp.float32)
        return new_top, total * shrink + weights.sum(-1, keepdims=True), sums * shrink + here

    blank = [jnp.full((shape[0], 1), MASKED, jnp.float32), jnp.zeros((shape[0], 1), jnp.float32)]
    top, total, sums = jax.lax.fori_loop(0, groups, body, (*blank, jnp.zeros(q_qH.shape, jnp.float32)))
    tops[...], totals[...] = (jnp.broadcast_to(a, (shape[0], _LANES)) for a in (top, total))
    seen[...] = sums
