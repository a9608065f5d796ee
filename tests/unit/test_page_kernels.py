"""The kernels of GPUs and TPUs that read the cache, worked through step by step, against XLA's attention."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from jax.experimental.pallas import tpu

from jaxdistill import sharding
from jaxdistill.errors import UserError
from jaxdistill.models.attention import Scores
from jaxdistill.models.quantized import STORED
from jaxdistill.sample import attention, mosaic, triton
from jaxdistill.sample import cache as kv
from jaxdistill.sample.attention import Kernel, Seeing
from jaxdistill.sample.engine import Engine, EngineConfig
from jaxdistill.sample.request import Request, SamplingConfig
from jaxdistill.sharding import spec

PAGE, PAGES = 32, 24
HEAD = {"triton": 16, "mosaic": 128}  # the least that each can
KEY_HEADS, HEADS = 2, 6
POSITIONS = np.array([200, 3, 0, 77])  # of each row's first new token


@pytest.fixture(params=["triton", "mosaic"])
def kernel(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Kernel:
    """Runs here, in short stretches, on a cache that is laid out as on its platform."""
    interpret(request.param, monkeypatch)
    return request.param


def interpret(kernel: Kernel, monkeypatch: pytest.MonkeyPatch) -> None:
    if kernel == "triton":
        monkeypatch.setattr(triton, "INTERPRET", True)
        monkeypatch.setattr(triton, "_STRETCH", 2 * PAGE)
        monkeypatch.setattr(attention, "_platform", lambda: "gpu")
    else:
        monkeypatch.setattr(mosaic, "INTERPRET", tpu.InterpretParams())
        monkeypatch.setattr(mosaic, "_BUFFER_BYTES", 2 * 2 * 2 * KEY_HEADS * PAGE * HEAD[kernel] * 4)  # two pages
        monkeypatch.setattr(attention, "_platform", lambda: "tpu")


def attended(
    kernel: Kernel, head: int, new: int, cache_dtype: kv.CacheDtype, rows: list[int], how: Seeing
) -> np.ndarray:
    """What so many new tokens of some rows see of pages that hold random keys and values; no token of row 2 is live."""
    random = np.random.default_rng(0)
    q = random.normal(size=(4, new, HEADS, head)).astype(np.float32)[rows]
    tables = random.permutation(PAGES)[: 4 * 6].reshape(4, 6)
    tables = np.concatenate([tables, tables], axis=1).astype(np.int32)[rows]
    positions = (POSITIONS[:, None] + np.arange(new)).astype(np.int32)[rows]
    live = np.broadcast_to(np.arange(4)[:, None] != 2, (4, new))[rows]
    dims = kv._dims(cache_dtype != "compute")

    def held(letters: str) -> np.ndarray:
        sizes = {"P": PAGES, "K": KEY_HEADS, "H": head, "p": PAGE}
        x = random.normal(size=[sizes[letter] for letter in letters])
        return 0.02 + abs(x) / 50 if "H" not in letters else x * (20 if cache_dtype == "int8" else 1)

    def stored(letters: str) -> jax.Array:
        x = jnp.asarray(held(letters))
        dtype = STORED.get(cache_dtype, jnp.float32) if "H" in letters else jnp.float32
        return sharding.put(np.asarray(x.astype(dtype)), letters)

    pages = jax.tree.map(stored, dims)
    how = dataclasses.replace(how, kernel=kernel)
    with sharding.whole_rows():
        run = jax.shard_map(
            functools.partial(attention.attend, how=how),
            in_specs=(spec("BTNH"), jax.tree.map(spec, dims), spec("BM"), spec("BT"), spec("BT")),
            out_specs=spec("BTNH"),
            check_vma=False,
        )
        put = sharding.put
        rows_in = put(q, "BTNH"), pages, put(tables, "BM"), put(positions, "BT"), put(live, "BT")
        return np.asarray(jax.jit(run)(*rows_in))


@pytest.mark.parametrize(("context", "new"), [(1, 23), (2, 1)])
@pytest.mark.parametrize(
    ("cache_dtype", "how"),
    [
        ("compute", Seeing()),
        ("compute", Seeing(Scores(scale=0.3, cap=2.0), window=40)),
        ("int8", Seeing(window=70)),
    ],
)
def test_kernel_sees_what_xla_sees(kernel: Kernel, context: int, new: int, cache_dtype: kv.CacheDtype, how: Seeing):
    if kernel == "mosaic" and cache_dtype != "compute":
        assert mosaic.misfit(HEAD[kernel], PAGE, cache_dtype)
        return
    with tiny.mesh(context=context):
        found, expected = (attended(k, HEAD[kernel], new, cache_dtype, [0, 1, 2, 3], how) for k in (kernel, "xla"))
    for row in (0, 1, 3):
        np.testing.assert_allclose(found[row], expected[row], rtol=0, atol=2e-6 * abs(expected[row]).max())


def test_a_row_does_not_notice_the_others(kernel: Kernel):
    with tiny.mesh():
        together = attended(kernel, HEAD[kernel], 23, "compute", [0, 1, 2, 3], Seeing())
        for row in (0, 1, 3):
            like_it = attended(kernel, HEAD[kernel], 23, "compute", [row] * 4, Seeing())
            np.testing.assert_array_equal(like_it, np.stack([together[row]] * 4))


def test_the_engine_samples_with_it_on_a_mesh(kernel: Kernel):
    c = tiny.config("qwen2", head_dim=HEAD[kernel])
    asked = [
        Request(str(i), tuple(range(3, 3 + n)), SamplingConfig(max_new_tokens=6)) for i, n in enumerate((40, 3, 17))
    ]
    said = []
    for reader in (kernel, "xla"):
        with tiny.mesh(data=2, tensor=2):
            how = EngineConfig(slots=4, page_tokens=PAGE, prefill_tokens=32, compute_dtype="float32", attention=reader)
            engine = Engine(tiny.put(tiny.values(c), c), c, (), 64, how)
            said.append({output.id: output.tokens for output in engine.generate(asked)})
    assert said[0] == said[1]


def test_sizes_and_devices_that_they_do_not_fit(monkeypatch: pytest.MonkeyPatch):
    with tiny.mesh():
        attention.check_kernel("xla", 96, 24)
        platforms: dict[Kernel, str] = {"triton": "GPUs", "mosaic": "TPUs"}
        for kernel, platform in platforms.items():
            with pytest.raises(UserError, match=f"{kernel} runs on {platform}, found cpu; use xla"):
                attention.check_kernel(kernel, 128, 128)
            interpret(kernel, monkeypatch)
        attention.check_kernel("triton", 128, 128)
        with pytest.raises(UserError, match="head_dim: 96, and triton needs a power of 2"):
            attention.check_kernel("triton", 96, 128)
        with pytest.raises(UserError, match="positions on one device: 24"):
            attention.check_kernel("triton", 128, 24)
        with pytest.raises(UserError, match="head_dim: 64, and mosaic needs a multiple of 128"):
            attention.check_kernel("mosaic", 64, 128)
        with pytest.raises(UserError, match="cache_dtype: int8"):
            attention.check_kernel("mosaic", 128, 128, "int8")
