"""What it costs that a request's tokens do not depend on its neighbours, in one run.

    .venv/bin/python benchmarks/invariance.py [--context 1024] [--slots 32]

SmolLM2-135M-Instruct. The engine pays twice for it, and each price is held against what an engine without the promise
would do instead:

- Shapes are fixed: a step computes all its slots, however few are taken. Held against an engine of just as many slots
  as there are requests, whose products XLA may add up in other orders.
- Attention adds up page by page, in an order of its own. Held against one softmax over all pages at once, which leaves
  the order to XLA and to how long the longest row is. (Only decoding is measured; the order is the same in prefill.)

Each figure is the median over decode calls of the milliseconds that a step takes, when all requests decode.
cost = ours / the other's.
"""

import argparse
import os
import statistics
import time

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp
import numpy as np
import smollm2
from einops import rearrange
from jaxtyping import Array

from jaxdistill import hf
from jaxdistill.models import decoder
from jaxdistill.models.config import Config
from jaxdistill.sample import cache
from jaxdistill.sample.attention import ALL, Pages, Seeing, page_dims, page_sizes
from jaxdistill.sample.engine import Engine, EngineConfig
from jaxdistill.sample.request import Request, SamplingConfig
from jaxdistill.sharding import MeshConfig

STEPS, CALLS = 8, 7  # steps of a call, calls that are timed


def at_once(q: Array, pages: Pages, tables: Array, positions: Array, live: Array, how: Seeing = ALL) -> Array:
    """`attend` for a plain model on one device, with one softmax over every page of the table."""
    (T, H), (K, p), (of_keys, of_values) = (q.shape[1], q.shape[3]), page_sizes(pages), page_dims()
    q_BKXH = rearrange(q, "B T (K G) H -> B K (G T) H", K=K)
    keys, values = pages.keys[tables], pages.values[tables]
    scores = jnp.einsum(f"BKXH,BM{of_keys[1:]}->BKXMp", q_BKXH, keys, preferred_element_type=jnp.float32)
    last_X = jnp.tile(positions, (1, q_BKXH.shape[2] // T))[:, None, :, None, None]
    key_positions = jnp.arange(tables.shape[1])[:, None] * p + jnp.arange(p)
    scores = jnp.where(key_positions <= last_X, scores * how.scores.scale_of(H), -1e30)
    weights = jax.nn.softmax(scores, axis=(-2, -1)).astype(q.dtype)
    with_values = f"BKXMp,BM{of_values[1:]}->BKXH"
    seen = jnp.einsum(with_values, weights, values, preferred_element_type=jnp.float32).astype(q.dtype)
    return rearrange(seen, "B K (G T) H -> B T (K G) H", T=T)


def step_ms(params: decoder.Params, c: Config, dtype: str, slots: int, requests: int, context: int) -> float:
    """Median milliseconds of a decode step with so many requests, each of about `context` tokens."""
    output = STEPS * (CALLS + 3)
    prompt = np.random.default_rng(0).integers(3, c.vocab, (requests, context - output)).tolist()
    how = EngineConfig(slots=slots, steps_per_call=STEPS, compute_dtype=dtype)  # pyright: ignore[reportArgumentType]
    engine = Engine(params, c, (), context, how)
    for i in range(requests):
        engine.submit(Request(str(i), tuple(prompt[i]), SamplingConfig(max_new_tokens=output)))
    engine.step(fill=True)
    engine.step()
    seconds = []
    for _ in range(CALLS):
        started = time.perf_counter()
        events = engine.step()  # waits for the call before
        seconds.append(time.perf_counter() - started)
        assert [len(event.tokens) for event in events] == [STEPS] * requests, events
    return statistics.median(seconds) / STEPS * 1e3


def main() -> None:
    """Prints both tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--slots", type=int, default=32)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    a = parser.parse_args()
    with jax.set_mesh(MeshConfig().build()):
        params, c = hf.load(smollm2.folder())
        print(f"{a.dtype}, {a.slots} slots, contexts of {a.context}")
        print("| requests | fixed shape, ms | their own shape, ms | cost |\n|---|---|---|---|")
        full = step_ms(params, c, a.dtype, a.slots, a.slots, a.context)
        requests = 1
        while requests < a.slots:
            fixed = step_ms(params, c, a.dtype, a.slots, requests, a.context)
            own = step_ms(params, c, a.dtype, requests, requests, a.context)
            print(f"| {requests} | {fixed:.1f} | {own:.1f} | {fixed / own:.2f} |", flush=True)
            requests *= 2
        cache.attend = at_once
        jax.clear_caches()
        other = step_ms(params, c, a.dtype, a.slots, a.slots, a.context)
        print(f"attention in its own order, page by page: {full:.1f} ms, all at once: {other:.1f} ms, ", end="")
        print(f"cost {full / other:.2f}")


if __name__ == "__main__":
    main()
