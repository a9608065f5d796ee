"""Loss parity: SmolLM2-135M trained from the same weights on the same rows, its projections in 8 bits or not.

    .venv/bin/python benchmarks/precision.py [--steps 24] [--row-tokens 512]

Every step has another row, the beginning of a real chain of ../shared/data/long_thought. A CPU computes the very
numbers of float8 and int8, not their speed: this says what they do to the loss. bfloat16, which nobody minds, is the
yardstick. Writes benchmarks/results/precision.md.
"""

import argparse
import os
import platform
import sys
from pathlib import Path
from typing import Any

import cpu_training
import numpy as np
import smollm2

from jaxdistill import manifest
from jaxdistill.errors import UserError

ROOT = Path(__file__).parents[1]
WAYS: dict[str, dict[str, Any]] = {
    "float32": {"compute_dtype": "float32"},
    "bfloat16": {"compute_dtype": "bfloat16"},
    "float8": {"compute_dtype": "float32", "matmul_dtype": "float8"},
    "int8": {"compute_dtype": "float32", "matmul_dtype": "int8"},
}
PEAK_LR = 1e-4  # as configs/smollm2_long_thought.py has it


def losses(model: Path, rows: np.ndarray, how: dict[str, Any]) -> list[float]:
    """The loss of each row before the step that trains on it, nats/token."""
    step = cpu_training.our_step(model, rows.shape[1] - 1, PEAK_LR, remat="attention", **how)
    return [step(row) for row in rows]


def main() -> None:
    """Trains in every way, prints and writes the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--row-tokens", type=int, default=512)
    asked = parser.parse_args()
    if not cpu_training.DATA.is_file():
        raise UserError(f"{cpu_training.DATA} is not there; expected the real chains beside the checkout")
    model = smollm2.folder()
    rows = cpu_training.rows_of(model, asked.row_tokens, asked.steps)
    found = {}
    for way, how in WAYS.items():
        found[way] = losses(model, rows, how)
        print(f"{way}: {' '.join(f'{loss:.4f}' for loss in found[way])}", flush=True)
    exact = np.array(found["float32"])
    lines = [
        "# Loss of SmolLM2-135M with its projections in 8 bits",
        "",
        (
            f"`.venv/bin/python benchmarks/precision.py` at {manifest.commit()}, {os.cpu_count()} {platform.machine()} "
            "cores."
        ),
        f"{len(rows)} AdamW steps at a learning rate of {PEAK_LR}, each on another row of {asked.row_tokens} tokens;",
        (
            "nats/token of a row before the step that trains on it. float8 and int8 are emulated, with the rest in "
            "float32."
        ),
        "Difference = loss - loss in float32 on the same row after as many steps.",
        "",
        "| way | mean loss | mean difference | largest difference | mean difference of the last quarter |",
        "|---|---|---|---|---|",
    ]
    for way, some in found.items():
        off = np.array(some) - exact
        last = off[-max(1, len(off) // 4) :].mean()
        largest = off[np.abs(off).argmax()]
        lines.append(f"| {way} | {np.mean(some):.4f} | {off.mean():+.4f} | {largest:+.4f} | {last:+.4f} |")
    lines += ["", "| step | " + " | ".join(found) + " |", "|---|" + "---|" * len(found)]
    for step, values in enumerate(zip(*found.values(), strict=True), start=1):
        lines.append(f"| {step} | " + " | ".join(f"{value:.4f}" for value in values) + " |")
    (ROOT / "benchmarks/results/precision.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    print("\n".join(lines))


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
