"""Is attention right on this device? Each packed kernel against the blockwise reference, outputs and gradients."""

import argparse
import functools
import json
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import shapes

from jaxdistill.models.attention import Backend, backends, blockwise, cudnn, mosaic
from jaxdistill.models.attention.packed import query_order

_MOST = 17  # documents of a row, its padding included
_TOLERANCE = 0.01  # relative norm of the error: bfloat16 operands lie between 1e-3 and 1e-2
_HEADS = ((32, 8, 128), (12, 2, 128), (14, 2, 64))  # query heads, key/value heads, head size


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--smoke", action="store_true", help="tiny, and the reference against itself")
    options = parser.parse_args()
    tokens = 256 if options.smoke else 4096
    kernels: dict[Backend, Any] = {"blockwise": blockwise.attend} if options.smoke else _kernels()
    found = [
        _compare(name, kernel, tokens, documents, *heads)
        for name, kernel in kernels.items()
        for heads in (_HEADS[-1:] if options.smoke else _HEADS)
        for documents in shapes.DOCUMENTS
    ]
    if not options.smoke:
        found += [
            _time(name, kernel, tokens, documents)
            for tokens in shapes.ROWS
            for documents in shapes.DOCUMENTS
            for name, kernel in kernels.items()
        ]
    options.out.write_text(json.dumps(found))
    wrong = [one for one in found if not one.get("error", 0) < _TOLERANCE]  # NaN is wrong too
    if wrong:
        raise SystemExit(f"attention is wrong, relative errors above {_TOLERANCE}: {wrong}")


def _inputs(tokens: int, documents: int, N: int, K: int, H: int) -> tuple[list[jax.Array], jax.Array]:
    """Random q, k, v and the output's gradient in bfloat16; the last tenth of the row is padding."""
    generator = np.random.default_rng()
    sizes = ((N, H), (K, H), (K, H), (N, H))
    arrays = [jnp.asarray(generator.normal(size=(1, tokens, *size)), jnp.bfloat16) for size in sizes]
    segments = np.zeros((1, tokens), np.int32)
    used = shapes.lengths(tokens - tokens // 10, documents)
    segments[0, : sum(used)] = np.repeat(np.arange(documents) + 1, used)
    return arrays, jnp.asarray(segments)


def _kernels() -> dict[Backend, Any]:
    """Those that this installation has for this device."""
    found: dict[Backend, Any] = {"cudnn": functools.partial(cudnn.attend, most=_MOST), "mosaic": mosaic.attend}
    return {name: kernel for name, kernel in found.items() if not backends.unavailable(name, jax.devices()[0])}


def _attend(backend: Any, q: jax.Array, k: jax.Array, v: jax.Array, segments: jax.Array) -> jax.Array:
    return backend(q, k, v, segments, query_order(q.shape[1], 1), 0)


def _compare(name: str, kernel: Any, tokens: int, documents: int, N: int, K: int, H: int) -> dict[str, Any]:
    """The largest relative error of the output and the gradients, of what the kernel gives in bfloat16."""
    (q, k, v, d_out), segments = _inputs(tokens, documents, N, K, H)

    def outputs(backend: Any, *arrays: jax.Array) -> list[jax.Array]:
        out, backward = jax.vjp(lambda q, k, v: _attend(backend, q, k, v, segments), *arrays)
        real = (segments > 0)[..., None, None]
        return [jnp.where(real, x, 0) for x in (out, *backward(jnp.where(real, d_out, 0).astype(out.dtype)))]

    expected = jax.jit(functools.partial(outputs, blockwise.attend))(*(x.astype(jnp.float32) for x in (q, k, v)))
    found = jax.jit(functools.partial(outputs, kernel))
    first, second = found(q, k, v), found(q, k, v)
    errors = [
        float(jnp.linalg.norm((a.astype(jnp.float32) - b).ravel()) / jnp.linalg.norm(b.ravel()))
        for a, b in zip(first, expected, strict=True)
    ]
    return {
        "check": f"{name}: {tokens} tokens, {documents} documents, {N} heads, {K} of keys, {H} wide",
        "error": max(errors, key=lambda error: (error != error, error)),
        "errors": dict(zip(("out", "dq", "dk", "dv"), errors, strict=True)),
        "repeats_bitwise": all(bool((a == b).all()) for a, b in zip(first, second, strict=True)),
    }


def _time(name: str, kernel: Any, tokens: int, documents: int) -> dict[str, Any]:
    """Seconds of forward and backward pass, and the rate by the FLOPs of the documents' causal halves."""
    N, K, H = _HEADS[0]
    (q, k, v, d_out), segments = _inputs(tokens, documents, N, K, H)

    @jax.jit
    def both(q: jax.Array, k: jax.Array, v: jax.Array) -> Any:
        return jax.vjp(lambda q, k, v: _attend(kernel, q, k, v, segments), q, k, v)[1](d_out)

    jax.block_until_ready(both(q, k, v))
    seconds = []
    for _ in range(10):
        started = time.perf_counter()
        jax.block_until_ready(both(q, k, v))
        seconds.append(time.perf_counter() - started)
    used = shapes.lengths(tokens - tokens // 10, documents)
    flops = 3.5 * sum(2 * N * H * n * n for n in used)
    taken = float(np.median(seconds))
    return {"kernel": name, "tokens": tokens, "documents": documents, "seconds": taken, "tflops": flops / taken / 1e12}


if __name__ == "__main__":
    main()
