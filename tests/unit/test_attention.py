"""Packed attention in blocks against the plain formula."""

import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from einops import rearrange
from jaxtyping import Array, Float, Int

from jaxdistill import sharding
from jaxdistill.models.attention import blockwise
from jaxdistill.models.attention.packed import packed_attention

Attend = Callable[[Array, Array, Array, Array], Array]
PADDING = 0  # the segment id of positions that hold no document


@jax.jit
def plain(
    q: Float[Array, "B T N H"], k: Float[Array, "B T K H"], v: Float[Array, "B T K H"], segments: Int[Array, "B T"]
) -> Float[Array, "B T N H"]:
    """All scores at once; a query sees the keys of its own document up to itself."""
    q = rearrange(q, "B T (K G) H -> B T K G H", K=k.shape[2])
    scores = jnp.einsum("BTKGH,BSKH->BKGTS", q, k) / q.shape[-1] ** 0.5
    mask = jnp.tril(segments[:, :, None] == segments[:, None])[:, None, None]
    out = jnp.einsum("BKGTS,BSKH->BTKGH", jax.nn.softmax(jnp.where(mask, scores, -jnp.inf), axis=-1), v)
    return rearrange(out, "B T K G H -> B T (K G) H")


def segment_ids(rows: Sequence[Sequence[int]], T: int) -> np.ndarray:
    ids = np.full((len(rows), T), PADDING, np.int32)
    for row, lengths in zip(ids, rows, strict=True):
        row[: sum(lengths)] = np.repeat(np.arange(len(lengths)) + 1, lengths)
    return ids


def draw(B: int, T: int, N: int, K: int, H: int) -> tuple[np.ndarray, ...]:
    rng = np.random.default_rng(T + H)
    return tuple(rng.standard_normal((B, T, heads, H), np.float32) for heads in (N, K, K, N))


# The documents of each row. Blocks are 16 queries by 16 keys, from rows of 128 on by 32.
ROWS = {
    "one document, no whole block": (50, [[50]]),
    "one document of whole blocks": (64, [[64]]),
    "shorter than a block": (7, [[7]]),
    "documents end where blocks end": (128, [[32, 64, 32], [16, 48, 64]]),
    "documents end one off the blocks": (128, [[31, 66, 31], [33, 63, 32]]),
    "64 documents": (192, [[3] * 64]),
    "documents of one token": (64, [[1] * 40 + [24]]),
    "padding after the documents": (130, [[40, 30], [97]]),
    "rows that differ within a batch": (100, [[100], [1] * 100, [99]]),
}


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blockwise, "_QUERY_BLOCK", 16)
    monkeypatch.setattr(blockwise, "_KEY_BLOCK", 32)


def check(T: int, rows: Sequence[Sequence[int]], N: int, K: int, H: int) -> None:
    """Outputs and gradients of the documents' positions equal the plain formula's; padding stays finite."""
    q, k, v, d_out = draw(len(rows), T, N, K, H)
    ids = segment_ids(rows, T)
    mask = (ids != PADDING)[:, :, None, None]

    def loss(attend: Attend, q: Array, k: Array, v: Array, ids: Array) -> tuple[Array, Array]:
        out = attend(q, k, v, ids)
        return jnp.sum(out * d_out * mask), out

    def run(attend: Attend, *inputs: Array) -> tuple[np.ndarray, ...]:
        with jax.default_matmul_precision("highest"):
            step = jax.jit(jax.value_and_grad(functools.partial(loss, attend), argnums=(0, 1, 2), has_aux=True))
            (_, out), gradients = step(*inputs)
        return tuple(map(np.asarray, (out, *gradients)))

    expected = run(plain, *map(jnp.asarray, (q, k, v, ids)))
    with tiny.mesh():
        placed = (sharding.put(x, names) for x, names in ((q, "BTNH"), (k, "BTKH"), (v, "BTKH"), (ids, "BT")))
        found = run(packed_attention, *placed)
    assert np.isfinite(found[0]).all(), "padding too must stay finite"
    np.testing.assert_allclose(found[0] * mask, expected[0] * mask, atol=2e-6)
    tiny.assert_trees_close(found[1:], expected[1:], 2e-6)


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("case", ROWS)
def test_each_document_is_as_if_alone(case: str):
    T, rows = ROWS[case]
    check(T, rows, N=4, K=2, H=16)


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize(("N", "K", "H"), [(9, 3, 64), (4, 1, 128), (2, 2, 64), (8, 2, 128)])
def test_heads(N: int, K: int, H: int):
    check(100, [[37, 40], [64, 36]], N, K, H)


def test_full_size_blocks():
    assert (blockwise._QUERY_BLOCK, blockwise._KEY_BLOCK) == (128, 256)
    check(1100, [[512, 300, 288]], N=4, K=2, H=16)


@pytest.mark.usefixtures("small_blocks")
def test_keys_of_earlier_documents_are_not_read():
    """A NaN among the keys of another document would spread through a product with weights of zero."""
    q, k, v, _ = draw(1, 128, 4, 2, 16)
    ids = segment_ids([[64, 64]], 128)
    v[:, :64] = np.nan
    with tiny.mesh():
        placed = (sharding.put(q, "BTNH"), sharding.put(k, "BTKH"), sharding.put(v, "BTKH"))
        out = np.asarray(packed_attention(*placed, sharding.put(ids, "BT")))
    assert np.isnan(out[:, :64]).all()
    assert np.isfinite(out[:, 64:]).all()


def test_large_scores_do_not_overflow():
    q, k, v, _ = draw(1, 64, 4, 2, 16)
    with tiny.mesh():
        placed = (sharding.put(q * 1e3, "BTNH"), sharding.put(k * 1e3, "BTKH"), sharding.put(v, "BTKH"))
        out = packed_attention(*placed, sharding.put(segment_ids([[64]], 64), "BT"))
    assert np.isfinite(np.asarray(out)).all()
