"""The backend of CPUs, and the reference: blocks of queries against the blocks of keys that their documents reach."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from jaxdistill.models.attention import OUTPUT_NAME, PLAIN, Scores

_QUERY_BLOCK = 128  # positions
_KEY_BLOCK = 256  # positions; in short rows, which hold short documents, a block of queries' worth
_MASKED = -1e30  # finite: a key that is not to be seen before the first that is leaves no NaN behind


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
    """Attention of one device's queries; time grows with what the documents need, and not with the row.

    Args:
      order: the positions among the keys of the queries that each of R devices holds, T = c t: c stretches of
        consecutive ones.
      shard: which of those devices this is.
      window: keys that a query sees at most, its own the last of them.
    """
    rows = jnp.asarray(order)[shard]
    S, chunks, T = k.shape[1], *rows.shape
    query_block = min(T, _QUERY_BLOCK)
    key_block = min(S, _KEY_BLOCK if S >= 8 * _QUERY_BLOCK else _QUERY_BLOCK)

    def blocks(x: Array, value: int = 0) -> Array:
        """[B, T, ...] with each stretch padded to whole blocks."""
        split = rearrange(x, "B (c t) ... -> (B c) t ...", c=chunks)
        return rearrange(_pad(split, query_block, value), "(B c) t ... -> B (c t) ...", c=chunks)

    past_end = rows[:, -1:] + 1 + jnp.arange(-T % query_block)
    padded_rows = jnp.concatenate([rows, past_end], axis=1).ravel()
    query_segments = blocks(segments[:, rows.ravel()], -1)
    visible = _visible(padded_rows, query_segments, _pad(segments, key_block, -2), query_block, key_block, window)
    out: Array = _blockwise(blocks(q), _pad(k, key_block), _pad(v, key_block), visible, scores)  # type: ignore[assignment]
    real = rearrange(out, "B (c t) ... -> B c t ...", c=chunks)[:, :, :T]
    return rearrange(real, "B c t ... -> B (c t) ...")


def _pad(x: Array, block: int, value: int = 0) -> Array:
    """Dimension 1 filled up to a multiple of `block`."""
    return jnp.pad(x, [(0, 0), (0, -x.shape[1] % block)] + [(0, 0)] * (x.ndim - 2), constant_values=value)


class _Visible(NamedTuple):
    """What each of Q blocks of t queries can see. Keys are in J blocks of s."""

    segments: Int[Array, "Q B t"]
    rows: Int[Array, "Q t"]  # positions of the queries among all keys
    first: Int[Array, " Q"]  # the block of keys where the earliest document of the block's first queries begins
    end: Int[Array, " Q"]  # one past the block that holds the block's last query
    earliest: Int[Array, "Q t"] | None  # the first key that each query's window lets it see; None: all
    key_segments: Int[Array, "J B s"]


def _visible(
    rows: Array, segments: Array, key_segments: Array, query_block: int, key_block: int, window: Array | None
) -> _Visible:
    S = key_segments.shape[1]
    rows = rearrange(rows, "(Q t) -> Q t", t=query_block)
    begins = jnp.pad(key_segments[:, 1:] != key_segments[:, :-1], ((0, 0), (1, 0)), constant_values=True)
    document_start = jax.lax.cummax(jnp.where(begins, jnp.arange(S), 0), axis=1)
    reach, earliest = jnp.min(document_start[:, rows[:, 0]], axis=0), None
    if window is not None:
        earliest = rows - window + 1
        reach = jnp.maximum(reach, earliest[:, 0])
    return _Visible(
        segments=rearrange(segments, "B (Q t) -> Q B t", t=query_block),
        rows=rows,
        first=reach // key_block,
        end=jnp.minimum(rows[:, -1], S - 1) // key_block + 1,
        earliest=earliest,
        key_segments=rearrange(key_segments, "B (J s) -> J B s", s=key_block),
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _blockwise(q: Array, k: Array, v: Array, visible: _Visible, scores: Scores) -> Array:
    """Attention with an online softmax and a backward pass that recomputes the scores (arXiv 2307.08691).

    Everything is a batch of plain matrix products of [X, H] with [s, H]; X = G t are the query heads of one key head.
    """
    return _forward(q, k, v, visible, scores)[0]


def _split_queries(x: Array, kv_heads: int, visible: _Visible) -> Array:
    return rearrange(x, "B (Q t) (K G) H -> Q B K (G t) H", K=kv_heads, Q=len(visible.rows))


def _join_queries(x: Array, visible: _Visible) -> Array:
    return rearrange(x, "Q B K (G t) H -> B (Q t) (K G) H", t=visible.rows.shape[1])


def _split_keys(x: Array, visible: _Visible) -> Array:
    return rearrange(x, "B (J s) K H -> J B K s H", J=len(visible.key_segments))


def _scores(q_BKXH: Array, k_BKsH: Array, block: _Visible, i: Array, scores: Scores) -> Array:
    """Scaled, capped and masked scores [B, K, X, s], float32, of one block of queries and the i-th of keys."""
    scores_BKXs = jnp.einsum("BKXH,BKsH->BKXs", q_BKXH, k_BKsH, preferred_element_type=jnp.float32)
    key_segments_Bs = block.key_segments[i]
    s = key_segments_Bs.shape[1]
    keys_s = i * s + jnp.arange(s)
    mask_Bts = (block.segments[:, :, None] == key_segments_Bs[:, None]) & (block.rows[:, None] >= keys_s)
    if block.earliest is not None:
        mask_Bts &= block.earliest[:, None] <= keys_s
    bias_B11ts = jnp.where(mask_Bts, 0.0, _MASKED)[:, None, None]
    scores_BKGts = rearrange(scores_BKXs, "B K (G t) s -> B K G t s", t=len(block.rows))
    scores_BKGts *= scores.scale_of(q_BKXH.shape[-1])
    if scores.cap is not None:
        scores_BKGts = scores.cap * jnp.tanh(scores_BKGts / scores.cap)
    return (scores_BKGts + bias_B11ts).reshape(scores_BKXs.shape)


def _forward(q: Array, k: Array, v: Array, visible: _Visible, how: Scores) -> tuple[Array, Any]:
    q_QBKXH, k_JBKsH, v_JBKsH = _split_queries(q, k.shape[2], visible), *(_split_keys(x, visible) for x in (k, v))

    def attend(item: tuple[Array, _Visible]) -> tuple[Array, Array]:
        q_BKXH, block = item
        block = block._replace(key_segments=visible.key_segments)

        def body(i: Array, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
            top, total, sums = carry
            scores = _scores(q_BKXH, k_JBKsH[i], block, i, how)
            new_top = jnp.maximum(top, scores.max(-1))
            weights, shrink = jnp.exp(scores - new_top[..., None]), jnp.exp(top - new_top)
            seen = jnp.einsum(
                "BKXs,BKsH->BKXH", weights.astype(v.dtype), v_JBKsH[i], preferred_element_type=jnp.float32
            )
            return new_top, total * shrink + weights.sum(-1), sums * shrink[..., None] + seen

        zeros = jnp.zeros(q_BKXH.shape, jnp.float32)
        start = (zeros[..., 0] + _MASKED, zeros[..., 0], zeros)
        top, total, sums = jax.lax.fori_loop(block.first, block.end, body, start)
        return (sums / total[..., None]).astype(q.dtype), top + jnp.log(total)

    out, log_total_QBKX = jax.lax.map(attend, (q_QBKXH, visible._replace(key_segments=None)))
    # With both of these saved, the backward pass need not run the forward one again
    out = checkpoint_name(_join_queries(out, visible), OUTPUT_NAME)
    log_total_QBKX = checkpoint_name(log_total_QBKX, OUTPUT_NAME)
    return out, (q, k, v, visible, out, log_total_QBKX)


def _backward(how: Scores, residuals: Any, d_out: Array) -> tuple[Array, Array, Array, None]:
    q, k, v, visible, out, log_total_QBKX = residuals
    k_JBKsH, v_JBKsH = _split_keys(k, visible), _split_keys(v, visible)
    q_QBKXH, out_QBKXH, d_out_QBKXH = (_split_queries(x, k.shape[2], visible) for x in (q, out, d_out))
    product_QBKX = jnp.sum(d_out_QBKXH.astype(jnp.float32) * out_QBKXH.astype(jnp.float32), -1)

    def matmul(equation: str, a: Array, b: Array) -> Array:
        return jnp.einsum(equation, a, b, preferred_element_type=jnp.float32)

    def differentiate(carry: tuple[Array, Array], item: Any) -> tuple[tuple[Array, Array], Array]:
        q_BKXH, d_out_BKXH, log_total_BKX, product_BKX, block = item
        block = block._replace(key_segments=visible.key_segments)

        def body(i: Array, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
            dq, dk, dv = carry
            scores = _scores(q_BKXH, k_JBKsH[i], block, i, how)
            weights = jnp.exp(scores - log_total_BKX[..., None])
            d_weights = matmul("BKXH,BKsH->BKXs", d_out_BKXH, v_JBKsH[i])
            d_scores = weights * (d_weights - product_BKX[..., None]) * how.scale_of(q.shape[-1])
            if how.cap is not None:  # the slope of tanh; masked scores lie far beyond the cap
                d_scores *= 1 - jnp.square(jnp.maximum(scores / how.cap, -1.0))
            d_scores = d_scores.astype(q.dtype)
            dv = dv.at[i].add(matmul("BKXs,BKXH->BKsH", weights.astype(q.dtype), d_out_BKXH))
            dk = dk.at[i].add(matmul("BKXs,BKXH->BKsH", d_scores, q_BKXH))
            return dq + matmul("BKXs,BKsH->BKXH", d_scores, k_JBKsH[i]), dk, dv

        start = (jnp.zeros(q_BKXH.shape, jnp.float32), *carry)
        dq, dk, dv = jax.lax.fori_loop(block.first, block.end, body, start)
        return (dk, dv), dq.astype(q.dtype)

    zeros = jnp.zeros(k_JBKsH.shape, jnp.float32)
    items = (q_QBKXH, d_out_QBKXH, log_total_QBKX, product_QBKX, visible._replace(key_segments=None))
    (dk, dv), dq = jax.lax.scan(differentiate, (zeros, zeros), items)
    dk, dv = (rearrange(x, "J B K s H -> B (J s) K H").astype(k.dtype) for x in (dk, dv))
    return _join_queries(dq, visible), dk, dv, None


_blockwise.defvjp(_forward, _backward)
