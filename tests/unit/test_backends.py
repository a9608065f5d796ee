"""Which attention backend runs where, and what is refused before a run starts."""

import dataclasses
import itertools
from types import SimpleNamespace
from typing import Any, get_args

import pytest
import tiny

from jaxdistill.errors import UserError
from jaxdistill.models.attention import Attention, Backend, ContextParallelism, backends, splash

TPU = SimpleNamespace(platform="tpu", device_kind="TPU v5p")
H100 = SimpleNamespace(platform="gpu", device_kind="NVIDIA H100 80GB HBM3", compute_capability="9.0")
MI300 = SimpleNamespace(platform="gpu", device_kind="AMD Instinct MI300X", compute_capability="gfx942")
A100 = SimpleNamespace(platform="gpu", device_kind="NVIDIA A100", compute_capability="8.0")
CPU = SimpleNamespace(platform="cpu", device_kind="cpu")


@pytest.fixture(autouse=True)
def _everything_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "version_of", lambda package: "0.0.17")
    monkeypatch.setattr(backends, "cudnn_version", lambda: 92_000)


def test_each_platform_has_its_own():
    assert [backends.choose(None, platform) for platform in ("tpu", "gpu", "cpu")] == ["splash", "cudnn", "blockwise"]
    assert backends.choose("blockwise", "tpu") == "blockwise"
    assert backends.choose("blockwise", "METAL") == "blockwise"
    with pytest.raises(UserError, match=r"platform 'METAL', but for tpu, gpu, cpu; set step.attention blockwise"):
        backends.choose(None, "METAL")


@pytest.mark.parametrize("device", [TPU, H100, A100, MI300, CPU], ids=lambda device: device.device_kind)
def test_what_is_available(device: Any):
    available = [b for b in get_args(Backend) if backends.unavailable(b, device) is None]
    own = [b for b, kind in (("splash", TPU), ("cudnn", H100), ("mosaic", H100)) if kind is device]
    assert available == [*own, "blockwise"]


def test_interpreting_splash_is_nothing_that_a_user_can_ask_for():
    reason = backends.unavailable("splash", CPU)
    assert reason == "splash runs on TPUs, found cpu"


def test_what_is_missing(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(backends, "version_of", lambda package: None)
    assert "tokamax: pip install" in (backends.unavailable("splash", TPU) or "")
    for backend in ("cudnn", "mosaic"):
        assert "capability 9.0 (H100) on, found 8.0" in (backends.unavailable(backend, A100) or "")
    for found in (None, "0.0.12"):
        monkeypatch.setattr(backends, "version_of", lambda package, found=found: found)
        assert f"tokamax 0.0.16 or newer, for Python 3.12, found {found}" in (
            backends.unavailable("mosaic", H100) or ""
        )
    for found in (None, 90_500):
        monkeypatch.setattr(backends, "cudnn_version", lambda found=found: found)
        assert f"cuDNN 90600 or newer, found {found}" in (backends.unavailable("cudnn", H100) or "")


def test_a_version_that_computes_more_than_it_must_says_so(monkeypatch: pytest.MonkeyPatch):
    assert backends.describe("splash") == "splash of tokamax 0.0.17"
    monkeypatch.setattr(backends, "version_of", lambda package: "0.0.12")
    assert "0.0.12, which computes the tiles of other documents" in backends.describe("splash")
    assert backends.describe("cudnn") == "cudnn of cuDNN 92000"
    assert backends.describe("blockwise") == "blockwise"


def check(
    backend: Backend,
    mesh: dict[str, int] | None = None,
    context: ContextParallelism = "all_gather",
    heads: tuple[int, int] = (8, 2),
    head_dim: int = 64,
    row_tokens: int = 4096,
    rows: int = 8,
    dtype: str = "bfloat16",
) -> None:
    c = dataclasses.replace(tiny.config("qwen2"), heads=heads[0], kv_heads=heads[1], head_dim=head_dim)
    device = {"splash": TPU, "cudnn": H100, "mosaic": H100, "blockwise": CPU}[backend]
    attention = Attention(backend=backend, context=context)
    backends.check(attention, c, tiny.ONE_DEVICE | (mesh or {}), rows, row_tokens, dtype, device)


def test_what_fits():
    check("blockwise", head_dim=16, row_tokens=77)
    check("blockwise", {"context": 4, "tensor": 2}, "ulysses", heads=(8, 2))
    check("blockwise", {"context": 4, "tensor": 2}, "all_gather", heads=(12, 6))
    for row_tokens in (512, 3072, 4096, 33_792):
        check("splash", row_tokens=row_tokens)
    check("splash", {"context": 8}, row_tokens=32_768, head_dim=128)
    check("cudnn", row_tokens=777)
    check("cudnn", {"data": 2, "context": 4}, "ulysses")
    check("mosaic", {"data": 2, "context": 4}, head_dim=256, row_tokens=776)


def test_splash_cuts_a_row_into_four_blocks_of_keys_or_more():
    """With one block, tokamax 0.0.12 gives wrong gradients of keys and values where query heads share them."""
    for length, chunks in itertools.product(range(128, 9_000, 128), (1, 4, 16)):
        if splash.misfit(length, chunks, head_dim=64) is None:
            block = splash._block(length, length // chunks)
            assert length % block == 0
            assert length // block >= 4


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"backend": "blockwise", "context": "ulysses", "heads": (12, 6), "mesh": {"context": 4, "tensor": 2}},
            r"deals 6 query and 3 key/value heads .* to mesh.context 4",
        ),
        ({"backend": "splash", "head_dim": 96}, r"head_dim is 96, splash is known to work with 64 and 128"),
        ({"backend": "splash", "row_tokens": 256}, r"rows of 256 tokens .* next row_tokens that it can is 512"),
        ({"backend": "splash", "row_tokens": 8200}, r"rows of 8200 tokens .* is 9216"),
        ({"backend": "splash", "row_tokens": 4096, "mesh": {"context": 3}}, r"rows of 4096 tokens .* is 4608"),
        ({"backend": "cudnn", "mesh": {"context": 2}}, r"cudnn computes whole rows; .* needs step.context ulysses"),
        ({"backend": "cudnn", "dtype": "float32"}, r"step.compute_dtype is float32, cudnn computes in bfloat16"),
        ({"backend": "mosaic", "dtype": "float32"}, r"step.compute_dtype is float32, mosaic computes in bfloat16"),
        (
            {"backend": "mosaic", "head_dim": 96},
            r"head_dim is 96, mosaic is known to work with 64, 128, 256; use cudnn",
        ),
        ({"backend": "cudnn", "head_dim": 260}, r"head_dim is 260, cudnn needs a multiple of 8"),
        (
            {"backend": "cudnn", "rows": 1024, "row_tokens": 4096},
            r"1024 rows x 4096 tokens x 8 .*step.accumulate",
        ),
    ],
    ids=lambda value: str(value)[:40],
)
def test_what_does_not_fit(arguments: dict[str, Any], message: str):
    found = rf"step.attention {arguments['backend']}: .*{message}.*; available here: .*blockwise"
    with pytest.raises(UserError, match=found):
        check(**arguments)


def test_windows_and_soft_caps_are_not_every_backends():
    plain = tiny.config("qwen2", max_position_embeddings=4096)
    capped = dataclasses.replace(plain, head_dim=64, score_cap=50.0)
    windowed = dataclasses.replace(plain, head_dim=64, window=1024, windowed=(True, False))
    cases: list[tuple[Backend, Any, str]] = [("splash", TPU, "blockwise"), ("cudnn", H100, "mosaic")]
    for backend, device, other in cases:
        for c, what in ((capped, "caps scores"), (windowed, "looks back 1024 of 4096 positions")):
            with pytest.raises(UserError, match=f"qwen2 {what}, which {backend} does not; set step.attention {other}"):
                backends.check(Attention(backend=backend), c, tiny.ONE_DEVICE, 8, 4096, "bfloat16", device)
            backends.check(Attention(backend="mosaic"), c, tiny.ONE_DEVICE, 8, 4096, "bfloat16", H100)
