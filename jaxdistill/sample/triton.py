"""Attention to pages for NVIDIA GPUs: one kernel, by Pallas, that reads each key and value once, where it lies.

XLA would copy every page out of the cache before it multiplies with it: three times the bytes.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton
from jaxtyping import Array, Float, Int

from jaxdistill.models.attention import Scores
from jaxdistill.models.layers import capped

MASKED = -1e30
_TILE_BYTES = 2**14  # keys of a tile: with its values and three tiles on their way 96 KiB of an SM's 228
_QUERIES = 64  # of a tile at most
_SMALLEST = 16  # side of a tile that tensor cores multiply
_STRETCH = 4096  # positions that one program reads; longer rows are read by several at a time
INTERPRET = False  # tests set it: a CPU works through the kernel step by step

Sums = tuple[Float[Array, "B K S X"], Float[Array, "B K S X"], Float[Array, "B K S X H"]]


def misfit(head_dim: int, page_tokens: int, cache_dtype: str = "compute") -> str | None:
    """Why the kernel cannot compute heads or pages of a size, or None.

    Args:
      page_tokens: positions of a page on one device.
      cache_dtype: any will do.
    """
    for what, size in (("head_dim", head_dim), ("a page's positions on one device", page_tokens)):
        if size < _SMALLEST or size & (size - 1):
            return f"{what}: {size}, and triton needs a power of 2 from {_SMALLEST} on"
    return None


def sums(
    q: Float[Array, "B K X H"],
    pages: tuple[Array, Array, Array | None, Array | None],
    tables: Int[Array, "B M"],
    last: Int[Array, "B X"],
    bounds: tuple[Int[Array, " B"], Int[Array, " B"]],
    stride: int,
    scores: Scores,
    window: int | None,
) -> Sums:
    """Numerators and denominators of softmax over S stretches of each row, relative to the largest score of each.

    How far the stretches reach depends on the page size alone, and a row's own bounds decide what is read: so a row's
    result depends on no other.

    Args:
      pages: keys and values [P, K, p, H]; in 8 bits also the scales of both [P, K, p].
      last: the last position that each query sees; position i p of page i is i times `stride`.
      bounds: the first page of each row to read, and the one after the last.
      window: positions that a query sees at most, its own the last of them.

    Returns:
      Largest scores, denominators, and sums of values, all in float32; 0 and MASKED where nothing was seen.
    """
    (B, K, X, H), (keys, values, *scales) = q.shape, pages
    p, M = keys.shape[2], tables.shape[1]
    tile = min(_QUERIES, max(_SMALLEST, pl.next_power_of_2(X)))
    rows = pl.cdiv(X, tile) * tile
    q = jnp.pad(q, ((0, 0), (0, 0), (0, rows - X), (0, 0)))
    last = jnp.pad(last, ((0, 0), (0, rows - X)), mode="edge")
    stretch = max(1, _STRETCH // p)
    S = pl.cdiv(M, stretch)
    by_head = pl.BlockSpec((keys.shape[0], None, p, H), lambda b, k, s, x: (0, k, 0, 0))
    of_scales = pl.BlockSpec((keys.shape[0], None, p), lambda b, k, s, x: (0, k, 0))
    of_row = pl.BlockSpec((1,), lambda b, k, s, x: (b,))
    of_queries = pl.BlockSpec((None, None, None, tile), lambda b, k, s, x: (b, k, s, x))
    tops, totals, seen = pl.pallas_call(
        functools.partial(
            _kernel, stretch=stretch, stride=stride, scale=scores.scale_of(H), cap=scores.cap, window=window
        ),
        grid=(B, K, S, rows // tile),
        in_specs=[
            pl.BlockSpec((None, M), lambda b, k, s, x: (b, 0)),
            of_row,
            of_row,
            pl.BlockSpec((None, tile), lambda b, k, s, x: (b, x)),
            pl.BlockSpec((None, None, tile, H), lambda b, k, s, x: (b, k, x, 0)),
            by_head,
            by_head,
            *[None if x is None else of_scales for x in scales],
        ],
        out_specs=[
            of_queries,
            of_queries,
            pl.BlockSpec((None, None, None, tile, H), lambda b, k, s, x: (b, k, s, x, 0)),
        ],
        out_shape=[jax.ShapeDtypeStruct((B, K, S, rows, *more), jnp.float32) for more in ((), (), (H,))],
        compiler_params=triton.CompilerParams(num_warps=4, num_stages=3),
        interpret=INTERPRET,
        name="attention_to_pages",
    )(tables, *bounds, last, q, keys, values, *scales)
    return tops[..., :X], totals[..., :X], seen[..., :X, :]


def _kernel(
    tables: Any,  # [M]
    first: Any,  # [1]
    end: Any,  # [1]
    last: Any,  # [x]
    queries: Any,  # [x, H]
    keys: Any,  # [P, p, H]
    values: Any,  # [P, p, H]
    key_scales: Any,  # [P, p] or None
    value_scales: Any,
    tops: Any,  # [x]
    totals: Any,  # [x]
    seen: Any,  # [x, H]
    *,
    stretch: int,
    stride: int,
    scale: float,
    cap: float | None,
    window: int | None,
) -> None:
    """One tile of queries of a row and a head, against one stretch of the row's pages, tile by tile."""
    q_xH, last_x = queries[...], last[...][:, None]
    (_, p, H), itemsize = keys.shape, q_xH.dtype.itemsize
    tile = min(p, max(_SMALLEST, _TILE_BYTES // (H * itemsize)))
    parts = p // tile
    start = jnp.maximum(pl.program_id(2) * stretch, first[0])
    stop = jnp.minimum((pl.program_id(2) + 1) * stretch, end[0])

    def body(i: Array, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        # Online softmax; weights of what is not seen are 0, whatever the largest score so far
        top, total, sums = carry
        number, part = i // parts, i % parts
        page, inside = tables[number], pl.ds(part * tile, tile)
        k_tH, v_tH = keys[page, inside, :].astype(q_xH.dtype), values[page, inside, :].astype(q_xH.dtype)
        scores = jax.lax.dot_general(q_xH, k_tH, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32)
        if key_scales is not None:
            scores *= key_scales[page, inside][None, :]
        positions = number * stride + part * tile + jax.lax.broadcasted_iota(jnp.int32, scores.shape, 1)
        visible = positions <= last_x
        if window is not None:
            visible &= positions > last_x - window
        scores = jnp.where(visible, capped(scores * scale, cap), MASKED)
        new_top = jnp.maximum(top, scores.max(-1))
        weights = jnp.where(visible, jnp.exp(scores - new_top[:, None]), 0.0)
        shrink = jnp.exp(top - new_top)
        total = total * shrink + weights.sum(-1)
        if value_scales is not None:
            weights *= value_scales[page, inside][None, :]
        here = jax.lax.dot(weights.astype(q_xH.dtype), v_tH, preferred_element_type=jnp.float32)
        return new_top, total, sums * shrink[:, None] + here

    zeros = jnp.zeros(q_xH.shape, jnp.float32)
    carry = jnp.full(q_xH.shape[:1], MASKED, jnp.float32), jnp.zeros(q_xH.shape[:1], jnp.float32), zeros
    carry = jax.lax.fori_loop(start * parts, jnp.maximum(start, stop) * parts, body, carry)
    tops[...], totals[...], seen[...] = carry
