"""The fastest matrix product and copy that this device does: the ceilings that steps are held against."""

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--smoke", action="store_true")
    options = parser.parse_args()
    sizes = (256,) if options.smoke else (4096, 8192, 16_384)
    a_copy = jnp.asarray(np.random.default_rng().normal(size=(1 << (10 if options.smoke else 28),)), jnp.float32)
    found = {
        "matmul_tflops": max(_product(n) for n in sizes),
        "copy_tb_per_s": 2 * a_copy.nbytes / _seconds(jax.jit(lambda x: x + 1), a_copy) / 1e12,
    }
    options.out.write_text(json.dumps(found))


def _product(n: int) -> float:
    """TFLOP/s of a product of random bfloat16 matrices: zeros run faster than real data."""
    a, b = (jax.random.normal(jax.random.key(i), (n, n), jnp.bfloat16) for i in range(2))
    return 2 * n**3 / _seconds(jax.jit(jnp.dot), a, b) / 1e12


def _seconds(f: Callable[..., jax.Array], *arguments: jax.Array) -> float:
    """The best of five tries of ten calls, which wait for one another on the device and not on the host."""
    jax.block_until_ready(f(*arguments))
    tries = []
    for _ in range(5):
        started = time.perf_counter()
        jax.block_until_ready([f(*arguments) for _ in range(10)])
        tries.append((time.perf_counter() - started) / 10)
    return min(tries)


if __name__ == "__main__":
    main()
