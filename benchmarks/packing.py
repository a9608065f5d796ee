"""Packing and dealing a million chains: seconds, padding, and how unevenly a step's FLOPs fall on 64 devices.

    .venv/bin/python benchmarks/packing.py

Lengths are those of the real chains in ../shared/data/long_thought, in tokens of SmolLM2, drawn with replacement and
varied by up to a tenth, so that a million chains do not have 650 lengths. Writes benchmarks/results/packing.md.
"""

import dataclasses
import sys
import time
from pathlib import Path

import numpy as np
import smollm2

from jaxdistill import manifest, metrics, records
from jaxdistill.data import chat, packing
from jaxdistill.data.dealing import Deal
from jaxdistill.errors import UserError
from jaxdistill.models.config import Config, Rope

ROOT = Path(__file__).parents[1]
DATA = ROOT.parent / "shared" / "data" / "long_thought"
CHAINS, ROW_TOKENS, RANKS = 1_000_000, 32_768, 64
QWEN2_5_7B = Config(
    model_type="qwen2",
    vocab=152_064,
    embed=3_584,
    mlp=18_944,
    layers=28,
    heads=28,
    kv_heads=4,
    head_dim=128,
    norm_eps=1e-6,
    rope=Rope(theta=1e6),
    tied=False,
    max_positions=32_768,
)


@dataclasses.dataclass(frozen=True)
class Result:
    """One way to deal the rows."""

    window: int
    seconds: float
    imbalance: float  # mean over steps
    worst: float  # step


def real_lengths() -> np.ndarray:
    """Tokens of every real chain, its problem included."""
    tokenizer = chat.load_tokenizer(smollm2.folder(ROOT / "runs" / "real" / "SmolLM2-135M-Instruct"))
    texts = [
        row["problem"] + row["response"]
        for path in sorted(DATA.glob("*.jsonl"))
        for _, row in records.read_json_objects(path)
        if "problem" in row and "response" in row
    ]
    return np.array([len(tokenizer(text).input_ids) for text in texts])


def deal(costs: np.ndarray, window: int) -> Result:
    """Deals one epoch; costs are FLOPs of a row."""
    started = time.perf_counter()
    steps = list(Deal(costs, RANKS, epochs=1, seed=0, window=window))
    seconds = time.perf_counter() - started
    found = [metrics.flop_imbalance(costs[step][None]) for step in steps if len(step) == RANKS]
    return Result(window, seconds, float(np.mean(found)), max(found))


def main() -> None:
    """Prints and writes the table."""
    if not DATA.is_dir():
        raise UserError(f"{DATA} is not there; expected the real chains beside the checkout")
    real = real_lengths()
    generator = np.random.default_rng(0)
    drawn = generator.choice(real, CHAINS) * generator.uniform(0.9, 1.1, CHAINS)
    lengths = np.clip(drawn.astype(int), 1, ROW_TOKENS)
    started = time.perf_counter()
    rows = packing.best_fit(lengths.tolist(), ROW_TOKENS)
    packing_s = time.perf_counter() - started
    squares = lengths.astype(float) ** 2
    attended = np.array([squares[row].sum() for row in rows]) / ROW_TOKENS
    costs = QWEN2_5_7B.flops_per_token(attended) * ROW_TOKENS
    padding = 1 - lengths.sum() / len(rows) / ROW_TOKENS
    lines = [
        "# Packing and dealing a million chains",
        "",
        f"`.venv/bin/python benchmarks/packing.py` at {manifest.commit()}, one CPU core.",
        f"{len(real)} real chains of {real.min()} to {real.max()} tokens, mean {real.mean():.0f}, drawn to {CHAINS:,};",
        f"rows of {ROW_TOKENS:,}, {RANKS} data-parallel ranks of one row each, FLOPs of Qwen2.5-7B:",
        "6 x matmul weights + 6 x layers x heads x head_dim x document length, per position.",
        f"Packed in {packing_s:.1f} s into {len(rows):,} rows; padding {padding:.3%};",
        f"a row costs {costs.min() / costs.mean():.2f} to {costs.max() / costs.mean():.2f} of the mean.",
        "",
        "| steps that trade rows | dealing, s | imbalance (max - mean) / mean, mean of steps | worst step |",
        "|---|---|---|---|",
    ]
    for window in (1, 4, 16, 64):
        found = deal(costs, window)
        lines.append(f"| {window} | {found.seconds:.2f} | {found.imbalance:.2%} | {found.worst:.1%} |")
    (ROOT / "benchmarks" / "results" / "packing.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    print("\n".join(lines))


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
