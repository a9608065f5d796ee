"""Packed attention of every backend against the plain formula."""

from typing import Any, get_args

import jax
import jax.numpy as jnp
import kernels
import numpy as np
import pytest
import tiny
from jaxtyping import Array
from plain_attention import PADDING, check, draw, plain, segment_ids

from jaxdistill import sharding
from jaxdistill.models.attention import (
    REFERENCE,
    Attention,
    Backend,
    ContextParallelism,
    Scores,
    blockwise,
    cudnn,
    splash,
)
from jaxdistill.models.attention.packed import packed_attention, query_order
from jaxdistill.models.remat import Remat, saving
from jaxdistill.plan import ahead, cuda, hardware

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
        out = np.asarray(packed_attention(*placed, sharding.put(ids, "BT"), REFERENCE))
    assert np.isnan(out[:, :64]).all()
    assert np.isfinite(out[:, 64:]).all()


def test_scores_of_a_whole_row_are_never_there():
    T, N = 2048, 4
    with tiny.mesh():
        q, k, v, _ = (sharding.put(x, "BTNH") for x in draw(1, T, N, 2, 16))
        segments = sharding.put(segment_ids([[1500, 548]], T), "BT")
        loss = lambda q, k, v: jnp.sum(packed_attention(q, k, v, segments, REFERENCE))  # noqa: E731
        program = jax.make_jaxpr(jax.grad(loss, (0, 1, 2)))(q, k, v)
    largest = max(variable.aval.size for e in ahead.equations(program.jaxpr) for variable in e.outvars)
    assert N * blockwise._QUERY_BLOCK * blockwise._KEY_BLOCK <= largest < N * T * T // 8, "those of two blocks are"


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("window", [2, 16, 37, 200])
@pytest.mark.parametrize("cap", [None, 1.5])
def test_windows_and_caps(window: int, cap: float | None):
    check(100, [[37, 40], [64, 36]], 4, 2, 16, scores=Scores(0.3, cap), window=window)


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("context", get_args(ContextParallelism))
def test_windows_and_caps_where_rows_are_split(context: ContextParallelism):
    sizes = {"data": 2, "context": 2, "tensor": 2}
    check(128, [[70, 40], [128]], 4, 4, 16, Attention(context=context), sizes, Scores(None, 1.5), window=37)


@pytest.mark.usefixtures("small_blocks")
def test_keys_behind_the_window_are_not_read():
    q, k, v, _ = draw(1, 128, 4, 2, 16)
    v[:, :64] = np.nan
    with tiny.mesh():
        placed = (sharding.put(q, "BTNH"), sharding.put(k, "BTKH"), sharding.put(v, "BTKH"))
        ids = sharding.put(segment_ids([[128]], 128), "BT")
        out = np.asarray(packed_attention(*placed, ids, REFERENCE, window=16))
    assert np.isfinite(out[:, 80:]).all()


def test_large_scores_do_not_overflow():
    q, k, v, _ = draw(1, 64, 4, 2, 16)
    with tiny.mesh():
        placed = (sharding.put(q * 1e3, "BTNH"), sharding.put(k * 1e3, "BTKH"), sharding.put(v, "BTKH"))
        out = packed_attention(*placed, sharding.put(segment_ids([[64]], 64), "BT"), REFERENCE)
    assert np.isfinite(np.asarray(out)).all()


# --- the kernels of TPUs and GPUs, emulated --------------------------------------------------------------------------

KERNELS = ("splash", "cudnn", "mosaic")
# Splash cuts rows of 512 into tiles of 128
KERNEL_ROWS = [[512], [128, 256, 128], [8] * 64, [127, 130, 3]]


@pytest.mark.parametrize(("N", "K", "H"), [(4, 2, 64), (3, 1, 128)], ids=["H=64", "H=128"])
@pytest.mark.parametrize("backend", KERNELS)
def test_each_document_is_as_if_alone_in_a_kernel(
    backend: Backend, N: int, K: int, H: int, monkeypatch: pytest.MonkeyPatch
):
    kernels.emulate(backend, monkeypatch)
    check(512, KERNEL_ROWS, N, K, H, Attention(backend=backend, segments=64))


@pytest.mark.parametrize("context", get_args(ContextParallelism))
def test_windows_caps_and_parts_of_rows_in_mosaic(context: ContextParallelism, monkeypatch: pytest.MonkeyPatch):
    kernels.emulate("mosaic", monkeypatch)
    how = Attention(backend="mosaic", context=context)
    check(128, [[70, 40], [128]], 4, 4, 16, how, {"data": 2, "context": 2, "tensor": 2}, Scores(0.3, 1.5), window=37)


@pytest.mark.parametrize("shards", [2, 4])
def test_shards_of_a_row_together_are_the_row(shards: int, monkeypatch: pytest.MonkeyPatch):
    """What each device of the context axis computes with splash, one after another on this one."""
    kernels.emulate("splash", monkeypatch)
    S, lengths = 256 * shards, [256 * shards - 150, 128]
    q, k, v, d_out = (jnp.asarray(x) for x in draw(1, S, 2, 1, 64))
    ids, order = jnp.asarray(segment_ids([lengths], S)), query_order(S, shards)
    mask = (ids != PADDING)[:, :, None, None]

    def in_shards(q: Array, k: Array, v: Array) -> Array:
        parts = [splash.attend(q[:, order[i].ravel()], k, v, ids, order, i) for i in range(shards)]
        return jnp.concatenate(parts, axis=1)[:, np.argsort(order.ravel())]

    with jax.default_matmul_precision("highest"):
        expected, back = jax.vjp(lambda q, k, v: plain(q, k, v, ids) * mask, q, k, v)
        found, back_in_shards = jax.vjp(lambda *qkv: jax.jit(in_shards)(*qkv) * mask, q, k, v)
        np.testing.assert_allclose(found, expected, atol=2e-6)
        tiny.assert_trees_close(back_in_shards(d_out), back(d_out), 2e-6)


def count(primitive: str, jaxpr: Any) -> int:
    """How often operations whose name begins so stand in a program."""
    return sum(equation.primitive.name.startswith(primitive) for equation in ahead.equations(jaxpr))


@pytest.mark.parametrize(
    ("backend", "kernel", "forward", "backward"),
    [("splash", "pallas_call", 1, 1), ("cudnn", "dot_product_attention", 1, 1), ("mosaic", "mpmd_map", 2, 2)],
)
def test_saved_output_spares_the_forward_kernel(
    backend: Backend, kernel: str, forward: int, backward: int, monkeypatch: pytest.MonkeyPatch
):
    """By name, and with it what else the backward pass needs; otherwise the kernel would run twice.

    tokamax's forward operation in Mosaic holds its kernel twice, the second time as it is for a batch; its backward
    one consists of two kernels.
    """
    if backend == "splash":
        kernels.require("tokamax")
    if backend == "mosaic":
        kernels.require("jax_cuda13_plugin")
        kernels.require("tokamax", "0.0.16")
        [h100] = cuda.devices(hardware.parse("h100"))
        monkeypatch.setattr("jax.extend.backend.get_default_device", lambda: h100)
        monkeypatch.setattr("tokamax._src.ops.op.infer_devices", lambda _: set())
    q, k, v, _ = draw(1, 512, 4, 2, 64)
    segments = segment_ids([[300, 212]], 512)
    with tiny.mesh():
        q, k, v = (sharding.put(x.astype(jnp.bfloat16), "BTNH") for x in (q, k, v))
        segments = sharding.put(segments, "BT")

        def layer(x: Array, scale: Array) -> tuple[Array, None]:
            return packed_attention(x * scale, k, v, segments, Attention(backend=backend)), None

        def kernels_run(remat: Remat) -> int:
            loss = lambda q: jnp.sum(saving(remat, layer)(q, jnp.bfloat16(2))[0])  # noqa: E731
            return count(kernel, jax.make_jaxpr(jax.grad(loss))(q).jaxpr)

        assert kernels_run("full") == 2 * forward + backward
        assert kernels_run("attention") == forward + backward
        assert kernels_run("matmuls") == forward + backward


def test_documents_in_the_memory_of_a_batch():
    ids = jnp.asarray([[1, 1, 2, 0], [1, 2, 2, 2], [0, 0, 0, 0]])
    lengths, starts = cudnn.documents(ids, 3)
    np.testing.assert_array_equal(lengths, [[2, 1, 1], [1, 3, 4], [0, 0, 0]])
    np.testing.assert_array_equal(starts, [[0, 2, 3, 4], [5, 8, 12, 12], [12, 12, 12, 12]])
    lengths, starts = cudnn.documents(jnp.asarray([[1, 2, 3, 0]]), 4)
    np.testing.assert_array_equal(lengths, [[1, 1, 1, 1]])
    np.testing.assert_array_equal(starts, [[0, 1, 2, 3, 4]])
