"""A decoding step of the sampler at batch 64: seconds by what reads the cache, and the bytes that have to be read."""

import dataclasses
import functools
import json
import time
from typing import Any, get_args

import jax
import jax.numpy as jnp
import numpy as np
import shapes
import step

from jaxdistill import sharding
from jaxdistill.models import decoder
from jaxdistill.sample import attention, programs, transfer
from jaxdistill.sample import cache as kv
from jaxdistill.sample.attention import Kernel
from jaxdistill.sample.choose import Features

SLOTS, PAGE, STEPS, TIMED = 64, 128, 16, 5


def main() -> None:
    options = shapes.parser(__doc__).parse_args()
    device = jax.devices()[0]
    values = shapes.MODELS.get(options.model, shapes.SMOKE)
    case = shapes.Case(options.model, options.row, values["num_hidden_layers"], "full")
    with jax.set_mesh(sharding.MeshConfig().build([device])):
        kernels: tuple[Kernel, ...] = get_args(Kernel)
        found = [measure(case, kernel) for kernel in kernels if not attention.unavailable(kernel, device)]
    by_xla = found[0]["first_tokens"]
    for one in found:
        one["first_tokens_as_xla"] = float(np.mean(np.equal(one.pop("first_tokens"), by_xla)))
    options.out.write_text(json.dumps(found))


def measure(case: shapes.Case, kernel: Kernel) -> dict[str, Any]:
    """The median step over some calls, with every slot near the end of its context."""
    c, dtype = case.architecture(), jnp.dtype(jnp.bfloat16)
    attention.check_kernel(kernel, c.head_dim, PAGE)
    params = programs.per_layer(step.random_weights(decoder.template(c)), c, dtype)
    pages = case.row_tokens // PAGE
    keys = jax.random.split(jax.random.key(0), c.layers)
    cache = kv.empty(c, SLOTS * pages, PAGE, dtype)
    cache = tuple(jax.tree.map(functools.partial(_random, key), pages) for key, pages in zip(keys, cache, strict=True))
    tables = np.random.default_rng(0).permutation(SLOTS * pages).astype(np.int32).reshape(SLOTS, pages)
    settings = {
        "c": c,
        "dtype": dtype,
        "features": Features(draws=False),
        "most_steps": STEPS,
        "kernel": kernel,
    }

    def call(cache: Any, active: np.ndarray) -> tuple[Any, np.ndarray, float]:
        rows = transfer.slots(SLOTS, {}, (), c.vocab, penalties=False)
        near_end = np.full(SLOTS, case.row_tokens - STEPS, np.int32)
        rows = dataclasses.replace(
            rows, token=np.arange(3, SLOTS + 3, dtype=np.int32), position=near_end, limit=near_end, active=active
        )
        state, at, keep = transfer.put((rows, tables, active))
        started = time.perf_counter()
        cache, _, drawn = programs.decode(params, cache, state, at, keep, np.int32(STEPS), **settings)
        tokens = np.asarray(drawn.tokens)
        return cache, tokens, (time.perf_counter() - started) / STEPS

    every = np.ones(SLOTS, np.bool_)
    cache, together, _ = call(cache, every)
    seconds = []
    for _ in range(TIMED):
        cache, _, one = call(cache, every)
        seconds.append(one)
    cache, alone, _ = call(cache, np.arange(SLOTS) == SLOTS // 2)
    read = sum(x.nbytes for x in jax.tree.leaves(params))
    if not c.tied:
        read -= params.embed.nbytes  # a few of its rows
    return {
        "model": case.model,
        "context": case.row_tokens,
        "slots": SLOTS,
        "kernel": kernel,
        "seconds": float(np.median(seconds)),
        "weight_bytes": read,
        "cache_bytes": SLOTS * (case.row_tokens - STEPS // 2) * kv.page_bytes(c, PAGE, dtype) // PAGE,
        "first_tokens": together[0].tolist(),
        "alone_says_the_same": bool((alone[:, SLOTS // 2] == together[:, SLOTS // 2]).all()),
    }


@functools.partial(jax.jit, donate_argnums=1)
def _random(key: jax.Array, x: jax.Array) -> jax.Array:
    return jax.random.normal(key, x.shape, x.dtype, out_sharding=jax.typeof(x).sharding)


if __name__ == "__main__":
    main()
