"""Which backend computes attention: each platform's own, and why another, or this one, cannot."""

import importlib.metadata
import re
import sys
from collections.abc import Mapping
from typing import Any, get_args

from packaging.version import Version

from jaxdistill.errors import UserError
from jaxdistill.models.attention import Attention, Backend, cudnn, mosaic, splash
from jaxdistill.models.config import Config

OWN: Mapping[str, Backend] = {"tpu": "splash", "gpu": "cudnn", "cpu": "blockwise"}
_MOSAIC_VERSION = Version("0.0.16")
_CUDNN_VERSION = 90_600  # 9.6.0, the first that takes packed sequences (jax's tests/fused_attention_stablehlo_test.py)


def choose(asked: Backend | None, platform: str) -> Backend:
    """The backend that was asked for, or else the platform's own.

    Args:
      platform: of a device, as jax names it; the device may be one that a program is only compiled for.

    Raises:
      UserError: none was asked for on a platform that has none of its own.
    """
    if asked is None and platform not in OWN:
        raise UserError(
            f"no attention is made for the platform {platform!r}, but for {', '.join(OWN)}; set step.attention "
            "blockwise, which runs everywhere, if slowly"
        )
    return asked or OWN[platform]


def unavailable(backend: Backend, device: Any) -> str | None:
    """Why a backend does not run on a device, and what to do about it; None where it does.

    Args:
      device: a jax.Device, or what a topology description has in its place.
    """
    if backend == "splash":
        if device.platform != "tpu":
            return f"splash runs on TPUs, found {device.device_kind}"
        if version_of("tokamax") is None:
            # Its last version for Python 3.11 asks for a typeguard that tyro does not go with
            package = "-e .[tpu]" if sys.version_info >= (3, 12) else "--no-deps tokamax==0.0.12"
            return f"splash needs the package tokamax: pip install {package}"
    if backend in ("cudnn", "mosaic"):
        if device.platform != "gpu":
            return f"{backend} runs on NVIDIA GPUs, found {device.device_kind}"
        capability = str(device.compute_capability)  # of AMD's GPUs a name, as gfx942
        if not re.fullmatch(r"\d+\.\d+", capability) or float(capability) < 9.0:
            return f"{backend} packs documents from compute capability 9.0 (H100) on, found {capability}"
    if backend == "mosaic":
        found = version_of("tokamax")
        if found is None or Version(found) < _MOSAIC_VERSION:
            return (
                f"mosaic needs tokamax {_MOSAIC_VERSION} or newer, for Python 3.12, found {found}: pip install tokamax"
            )
    if backend == "cudnn":
        found = cudnn_version()
        if found is None or found < _CUDNN_VERSION:
            return f"cudnn needs cuDNN {_CUDNN_VERSION} or newer, found {found}: pip install -U -e .[cuda13]"
    return None


def describe(backend: Backend) -> str:
    """A backend with the version of what computes it, and what that version lacks."""
    if backend == "splash":
        found = version_of("tokamax") or "0"
        lacking = "computes the tiles of other documents, to mask them; 0.0.16, for Python 3.12, skips them"
        old = Version(found) < Version("0.0.16")
        return f"splash of tokamax {found}" + f", which {lacking}" * old
    if backend == "cudnn":
        return f"cudnn of cuDNN {cudnn_version()}"
    if backend == "mosaic":
        return f"mosaic of tokamax {version_of('tokamax')}"
    return backend


def version_of(package: str) -> str | None:
    """The installed version of a package, None where it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def cudnn_version() -> int | None:
    """The version of cuDNN as it counts itself (9.6.0 is 90600), None where jax has no CUDA or CUDA no cuDNN."""
    from jax._src.lib import cuda_versions

    try:
        return cuda_versions.cudnn_get_version() if cuda_versions else None
    except RuntimeError:  # "cuDNN not found."
        return None


def check(
    attention: Attention, c: Config, mesh: Mapping[str, int], rows: int, row_tokens: int, dtype: str, device: Any
) -> None:
    """Refuses, before anything is read, what a backend cannot compute.

    Args:
      mesh: devices by axis.
      rows: rows that all devices work on at a time.
      dtype: of activations.

    Raises:
      UserError: the backend is not available, or it does not fit the model, the rows or the mesh.
    """
    reason = unavailable(attention.backend, device) or _misfit(attention, c, mesh, rows, row_tokens, dtype)
    if reason:
        others = [backend for backend in get_args(Backend) if not unavailable(backend, device)]
        raise UserError(
            f"attention on {device.device_kind} with step.attention {attention.backend}: {reason}; available here: "
            f"{', '.join(others)}"
        )


def _misfit(
    attention: Attention, c: Config, mesh: Mapping[str, int], rows: int, row_tokens: int, dtype: str
) -> str | None:
    if attention.backend in ("splash", "cudnn") and (c.score_cap is not None or c.windows(row_tokens)):
        what = "caps scores" if c.score_cap is not None else f"looks back {c.window} of {row_tokens} positions"
        other = "mosaic" if attention.backend == "cudnn" else "blockwise"
        return f"{c.model_type} {what}, which {attention.backend} does not; set step.attention {other}"
    shards, N, K = mesh["context"], c.heads // mesh["tensor"], c.kv_heads // mesh["tensor"]
    ulysses = attention.context == "ulysses"
    if ulysses and (N % shards or (K % shards and shards % K)):
        return (
            f"step.context ulysses deals {N} query and {K} key/value heads (of one share of mesh.tensor) to "
            f"mesh.context {shards} devices, which does not come out even; use all_gather or another mesh.context"
        )
    if attention.backend == "splash":
        return splash.misfit(row_tokens, 1 if ulysses or shards == 1 else 2 * shards, c.head_dim)
    if attention.backend == "mosaic":
        return mosaic.misfit(c.head_dim, dtype)
    if attention.backend == "cudnn":
        if shards > 1 and not ulysses:
            return "cudnn computes whole rows; where mesh.context splits them it needs step.context ulysses"
        return cudnn.misfit(rows // (mesh["data"] * mesh["fsdp"]), row_tokens, N // shards, c.head_dim, dtype)
    return None
