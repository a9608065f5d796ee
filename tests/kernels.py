"""The kernels of TPUs and GPUs on a CPU, for tests: tokamax's step by step, cuDNN's by what its arguments mean."""

import importlib.metadata
import importlib.util
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from einops import rearrange, repeat
from jax.experimental.pallas import tpu as pltpu
from packaging.version import Version

from jaxdistill.models.attention import mosaic, splash


def emulate(backend: str, patch: pytest.MonkeyPatch) -> None:
    """Makes a backend run on this CPU until the patch is undone; skips the test where its package is missing."""
    if backend == "splash":
        require("tokamax")
        # Simulates a TPU's memory: what was never written is NaN, and a block that stays is not read again. Plainly
        # interpreted, jax 0.10 does not let a kernel see what it wrote to an output that shares an input's memory.
        patch.setattr(splash, "_INTERPRET", pltpu.InterpretParams())
    elif backend == "cudnn":
        _lower_cudnn_to_cpu()
    elif backend == "mosaic":
        require("tokamax", "0.0.16")
        base, _ = mosaic._operations()
        patch.setattr(mosaic, "_operations", lambda: (base, base.DotProductAttention(vjp=_mosaic_vjp)))


def require(package: str, version: str = "0") -> None:
    """Skips the test where a package is missing or older; does not import it."""
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed")
    if version != "0" and Version(importlib.metadata.version(package)) < Version(version):
        pytest.skip(f"{package} is {importlib.metadata.version(package)}; the test needs {version}, for Python 3.12")


def _mosaic_vjp(residuals: Any, out: Any, d_out: Any, q: Any, k: Any, v: Any, **settings: Any) -> dict[str, Any]:
    """What tokamax's kernels are told, by its own formula of the forward pass."""
    base, _ = mosaic._operations()
    attend = lambda *qkv: base.DotProductAttention()._fwd(*qkv, **settings, config=None)[0]  # noqa: E731
    return dict(zip("qkv", jax.vjp(attend, q, k, v)[1](d_out), strict=True))


def _lower_cudnn_to_cpu() -> None:
    from jax._src.cudnn import fused_attention_stablehlo as fa
    from jax._src.interpreters import mlir

    for primitive, function in ((fa._dot_product_attention_fwd_p, _fwd), (fa._dot_product_attention_bwd_p, _bwd)):
        mlir.register_lowering(primitive, mlir.lower_fun(function, multiple_results=True), platform="cpu")


def _documents(lengths: Any, offsets: Any, tokens: int, stride: int) -> tuple[Any, Any]:
    """The document of each token, -1 for those that are in none, and the token's place in it.

    Args:
      offsets: in elements, of documents in tensors with `stride` elements a token.
    """
    starts, at = offsets.ravel() // stride, jnp.arange(tokens)
    document = jnp.searchsorted(starts, at, side="right") - 1
    place = at - starts[document]
    return jnp.where(place < lengths.ravel()[document], document, -1), place


def _attention(q: Any, k: Any, v: Any, lengths: Any, q_offsets: Any, k_offsets: Any, scale: float) -> Any:
    """Causal attention within the documents that lie in the memory of [B, T, ...]; zero outside of them."""
    (B, T, N, H), K = q.shape, k.shape[2]
    q_document, q_place = _documents(lengths, q_offsets, B * T, N * H)
    k_document, k_place = _documents(lengths, k_offsets, B * T, K * H)
    seen = (q_document[:, None] == k_document) & (q_place[:, None] >= k_place) & (q_document >= 0)[:, None]
    q = rearrange(q, "B T N H -> (B T) N H")
    k, v = (repeat(x, "B T K H -> (B T) (K G) H", G=N // K) for x in (k, v))
    scores = jnp.where(seen, jnp.einsum("TNH,SNH->NTS", q, k) * scale, -jnp.inf)
    weights = jnp.where(seen, jax.nn.softmax(scores, axis=-1), 0)
    return rearrange(jnp.einsum("NTS,SNH->TNH", weights, v), "(B T) N H -> B T N H", B=B)


def _fwd(q, k, v, bias, q_lengths, k_lengths, q_offsets, k_offsets, *pages, scale, **rest):
    B, T, N, _ = q.shape
    statistics = jnp.zeros((B * q_lengths.shape[1], N, T), jnp.float32)
    return _attention(q, k, v, q_lengths, q_offsets, k_offsets, scale), statistics


def _bwd(q, k, v, bias, q_lengths, k_lengths, q_offsets, k_offsets, *rest, scale, **settings):
    *_, d_out = rest
    attend = lambda q, k, v: _attention(q, k, v, q_lengths, q_offsets, k_offsets, scale)  # noqa: E731
    return jax.vjp(attend, q, k, v)[1](d_out)
