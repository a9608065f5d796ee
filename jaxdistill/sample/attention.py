"""Attention of new tokens to the pages their request holds: the one place where a device's own kernel would go in."""

import dataclasses

import jax
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Bool, Float, Int

from jaxdistill.models.attention import PLAIN, Scores
from jaxdistill.models.layers import capped

_GROUP_BYTES = 2**21  # keys of one page of each row that a CPU's second-level caches hold
_MASKED = -1e30


@dataclasses.dataclass(frozen=True)
class Seeing:
    """What a layer's queries see, and how."""

    scores: Scores = PLAIN
    window: int | None = None  # keys at most, a query's own the last of them


ALL = Seeing()


def attend(
    q: Float[Array, "B T N H"],
    keys: Float[Array, "P K H S"],
    values: Float[Array, "P K S H"],
    tables: Int[Array, "B M"],
    positions: Int[Array, "B T"],
    live: Bool[Array, "B T"],
    how: Seeing = ALL,
) -> Float[Array, "B T N H"]:
    """Each query sees the keys of its row up to its own position, or its window's, page by page, on one device.

    The order of additions, and with it a result's last bits, depends on the page size alone: not on the other rows, nor
    on where the pages lie.
    """
    (B, T), (K, S, H) = q.shape[:2], values.shape[1:]
    q_BKXH = rearrange(q, "B T (K G) H -> B K (G T) H", K=K)
    size = _group_size(B, K * H * S * keys.dtype.itemsize)
    if size == B:
        out = _attend_together(q_BKXH, keys, values, tables, positions, live, how)
    else:

        def group(first: Array) -> Array:
            own = [jax.lax.dynamic_slice_in_dim(a, first, size) for a in (q_BKXH, tables, positions, live)]
            return _attend_together(own[0], keys, values, *own[1:], how=how)

        out = jax.lax.map(group, jnp.arange(0, B, size)).reshape(q_BKXH.shape)
    return rearrange(out, "B K (G T) H -> B T (K G) H", T=T)


def _group_size(rows: int, page_bytes: int) -> int:
    """Rows to attend at a time: all on an accelerator; on a CPU as many as its caches hold a page of the keys of."""
    if jax.default_backend() != "cpu":
        return rows
    return max((n for n in range(1, rows + 1) if rows % n == 0 and n * page_bytes <= _GROUP_BYTES), default=1)


def _attend_together(
    q_BKXH: Array, keys: Array, values: Array, tables: Array, positions: Array, live: Array, how: Seeing
) -> Array:
    """Attention [B, K, X, H] of B rows, up to the longest of them."""
    (_, _, X, H), S, dtype = q_BKXH.shape, keys.shape[-1], q_BKXH.dtype
    # The last key that each of X = G T queries sees
    last_X = jnp.tile(positions, (1, X // positions.shape[1]))[:, None, :, None]

    def body(i: Array, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        # Online softmax. A page with no key to see changes nothing, to the last bit: so a row's result does not
        # depend on how far the loop runs for the sake of longer rows.
        top, total, sums = carry
        pages = jax.lax.dynamic_index_in_dim(tables, i, axis=1, keepdims=False)
        k_BKHS, v_BKSH = keys[pages].astype(dtype), values[pages].astype(dtype)
        scores = jnp.einsum("BKXH,BKHS->BKXS", q_BKXH, k_BKHS, preferred_element_type=jnp.float32)
        visible = i * S + jnp.arange(S) <= last_X
        if how.window is not None:
            visible &= i * S + jnp.arange(S) > last_X - how.window
        scores = jnp.where(visible, capped(scores * how.scores.scale_of(H), how.scores.cap), _MASKED)
        new_top = jnp.maximum(top, scores.max(-1))
        weights = jnp.where(visible, jnp.exp(scores - new_top[..., None]), 0.0)
        shrink = jnp.exp(top - new_top)
        seen = jnp.einsum("BKXS,BKSH->BKXH", weights.astype(dtype), v_BKSH, preferred_element_type=jnp.float32)
        return new_top, total * shrink + weights.sum(-1), sums * shrink[..., None] + seen

    zeros = jnp.zeros(q_BKXH.shape, jnp.float32)
    start = (zeros[..., 0] + _MASKED, zeros[..., 0], zeros)
    count, first = jnp.max(jnp.where(live, positions, 0)) // S + 1, 0
    if how.window is not None:  # pages that are behind every row's window
        first = jnp.maximum(jnp.min(jnp.where(live, positions, count * S)) - how.window + 1, 0) // S
    _, total, sums = jax.lax.fori_loop(first, count, body, start)
    return (sums / jnp.maximum(total, 1e-30)[..., None]).astype(dtype)
