"""Packed attention by the plain formula, and the comparison of `packed_attention` with it on any mesh."""

import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
import tiny
from einops import rearrange
from jaxtyping import Array, Float, Int

from jaxdistill import sharding
from jaxdistill.models.attention import PLAIN, REFERENCE, Attention, Scores
from jaxdistill.models.attention.packed import packed_attention

Attend = Callable[[Array, Array, Array, Array], Array]
PADDING = 0  # the segment id of positions that hold no document


@functools.partial(jax.jit, static_argnames=("scores", "window"))
def plain(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    segments: Int[Array, "B T"],
    scores: Scores = PLAIN,
    window: int | None = None,
) -> Float[Array, "B T N H"]:
    """All scores at once; a query sees the keys of its own document up to itself, or the last of them."""
    q = rearrange(q, "B T (K G) H -> B T K G H", K=k.shape[2])
    products = jnp.einsum("BTKGH,BSKH->BKGTS", q, k) * scores.scale_of(q.shape[-1])
    if scores.cap is not None:
        products = scores.cap * jnp.tanh(products / scores.cap)
    mask = jnp.tril(segments[:, :, None] == segments[:, None])[:, None, None]
    if window is not None:
        mask &= ~jnp.tril(jnp.ones_like(mask), -window)
    out = jnp.einsum("BKGTS,BSKH->BTKGH", jax.nn.softmax(jnp.where(mask, products, -jnp.inf), axis=-1), v)
    return rearrange(out, "B T K G H -> B T (K G) H")


def segment_ids(rows: Sequence[Sequence[int]], T: int) -> np.ndarray:
    """Rows [B, T] of documents with these lengths, and padding."""
    ids = np.full((len(rows), T), PADDING, np.int32)
    for row, lengths in zip(ids, rows, strict=True):
        row[: sum(lengths)] = np.repeat(np.arange(len(lengths)) + 1, lengths)
    return ids


def draw(B: int, T: int, N: int, K: int, H: int) -> tuple[np.ndarray, ...]:
    """q, k, v and the gradient of the output."""
    rng = np.random.default_rng(T + H)
    return tuple(rng.standard_normal((B, T, heads, H), np.float32) for heads in (N, K, K, N))


def check(
    T: int,
    rows: Sequence[Sequence[int]],
    N: int,
    K: int,
    H: int,
    attention: Attention = REFERENCE,
    sizes: dict[str, int] | None = None,
    scores: Scores = PLAIN,
    window: int | None = None,
) -> None:
    """Outputs and gradients of the documents' positions equal the plain formula's; padding stays finite."""
    q, k, v, d_out = draw(len(rows), T, N, K, H)
    ids = segment_ids(rows, T)
    d_out *= (ids != PADDING)[:, :, None, None]

    def loss(attend: Attend, q: Array, k: Array, v: Array, ids: Array, d_out: Array) -> tuple[Array, Array]:
        out = attend(q, k, v, ids)
        return jnp.sum(out * d_out), out

    def run(attend: Attend, *inputs: Array) -> list[np.ndarray]:
        with jax.default_matmul_precision("highest"):
            step = jax.jit(jax.value_and_grad(functools.partial(loss, attend), argnums=(0, 1, 2), has_aux=True))
            (_, out), gradients = step(*inputs)
        return [np.asarray(x) for x in (out, *gradients)]

    # In float64: what is compared is then the backend's rounding alone, not the order of the reference's sums
    with jax.enable_x64(True):
        expected = run(
            functools.partial(plain, scores=scores, window=window),
            *(jnp.asarray(x, jnp.int32 if x is ids else jnp.float64) for x in (q, k, v, ids, d_out)),
        )
    with tiny.mesh(**(sizes or {})) as mesh:
        order = sharding.row_order(T, mesh.shape["context"])
        letters = ("BTNH", "BTKH", "BTKH", "BT", "BTNH")
        placed = [sharding.put(x[:, order], names) for x, names in zip((q, k, v, ids, d_out), letters, strict=True)]
        attend = functools.partial(packed_attention, attention=attention, scores=scores, window=window)
        found = run(attend, *placed)
    found = [x[:, np.argsort(order)] for x in found]
    assert np.isfinite(found[0]).all(), "padding too must stay finite"
    documents = ids != PADDING
    np.testing.assert_allclose(found[0][documents], expected[0][documents], atol=2e-6)
    tiny.assert_trees_close(found[1:], expected[1:], 2e-6)
