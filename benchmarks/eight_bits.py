"""What 8-bit weights and an 8-bit cache cost the sampler in accuracy: SmolLM2-135M on real chains.

    .venv/bin/python benchmarks/eight_bits.py [--chains 8] [--tokens 1024]

The engine reads the beginning of chains of ../shared/data/long_thought and tells each token's log-probability, its keys
and values having gone through the cache; then the same with other formats. bfloat16, which nobody minds, is the
yardstick. Greedy agreement: share of tokens whose most likely candidate is float32's. Writes
benchmarks/results/eight_bits.md.
"""

import argparse
import os
import platform
import sys
from pathlib import Path
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import cpu_training
import jax
import numpy as np
import smollm2

from jaxdistill import hf, manifest
from jaxdistill.errors import UserError
from jaxdistill.sample import cache
from jaxdistill.sample.engine import Engine, EngineConfig
from jaxdistill.sample.request import Request, SamplingConfig
from jaxdistill.sharding import MeshConfig

RESULTS = Path(__file__).parent / "results" / "eight_bits.md"
WAYS: dict[str, dict[str, Any]] = {
    "float32": {"compute_dtype": "float32"},
    "bfloat16": {"compute_dtype": "bfloat16"},
    "weights int8": {"compute_dtype": "float32", "weight_dtype": "int8"},
    "weights float8": {"compute_dtype": "float32", "weight_dtype": "float8"},
    "cache int8": {"compute_dtype": "float32", "cache_dtype": "int8"},
    "cache float8": {"compute_dtype": "float32", "cache_dtype": "float8"},
    "bfloat16, weights and cache int8": {"compute_dtype": "bfloat16", "weight_dtype": "int8", "cache_dtype": "int8"},
}


def read(model: Path, rows: np.ndarray, how: dict[str, Any]) -> tuple[np.ndarray, np.ndarray, int]:
    """Log-probability of each token but the first of each row, the most likely token there, and bytes a position."""
    with jax.set_mesh(MeshConfig().build()):
        params, c = hf.load(model)
        engine = Engine(params, c, (), rows.shape[1] + 1, EngineConfig(slots=len(rows), **how))
        asked = [
            Request(str(i), tuple(row.tolist()), SamplingConfig(max_new_tokens=1), prompt_logprobs=True)
            for i, row in enumerate(rows)
        ]
        outputs = sorted(engine.generate(asked), key=lambda output: int(output.id))
        size = cache.page_bytes(c, 1, engine.dtype, engine.config.cache_dtype)
    told = [output.prompt_logprobs for output in outputs]
    return (
        np.array([[x.logprob for x in row] for row in told]),
        np.array([[x.top[0][0] for x in row] for row in told]),
        size,
    )


def main() -> None:
    """Measures every way, prints and writes the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--chains", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=1024)
    asked = parser.parse_args()
    if not cpu_training.DATA.is_file():
        raise UserError(f"{cpu_training.DATA} is not there; expected the real chains beside the checkout")
    model = smollm2.folder()
    rows = cpu_training.rows_of(model, asked.tokens - 1, asked.chains)
    lines = [
        "# SmolLM2-135M sampled with weights or cache in 8 bits",
        "",
        f"`.venv/bin/python benchmarks/eight_bits.py` at {manifest.commit()}, {os.cpu_count()} {platform.machine()}",
        f"cores; {rows.size} tokens of {len(rows)} real chains. Differences are those of log-probabilities to those of",
        "float32, in nats.",
        "",
        "| way | mean loss | mean difference | mean absolute difference | greedy agreement | cache bytes a position |",
        "|---|---|---|---|---|---|",
    ]
    exact = best = np.zeros(0)
    for way, how in WAYS.items():
        found, likely, size = read(model, rows, how)
        if way == "float32":
            exact, best = found, likely
        off = found - exact
        lines.append(
            f"| {way} | {-found.mean():.4f} | {-off.mean():+.4f} | {np.abs(off).mean():.4f} | "
            f"{np.mean(likely == best):.2%} | {size} |"
        )
        print(lines[-1], flush=True)
    RESULTS.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
