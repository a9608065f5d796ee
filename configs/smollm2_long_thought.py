"""SmolLM2-135M-Instruct on real long-thought chains, on a CPU: `make real` runs it and evaluates before and after.

    jaxdistill train configs/smollm2_long_thought.py

Hardware: 16 GB; a step takes some 100 seconds on 2 cores, all of them an hour and a half. Expect the loss on held-out
chains to fall from 1.22 to 1.00; 135M parameters stay weak at mathematics (benchmarks/results/real.md).
"""

from pathlib import Path

from jaxdistill.optim import OptimConfig
from jaxdistill.train.config import Phase, TrainConfig
from jaxdistill.train.step import StepConfig

RUN = Path("runs/real")


def config() -> TrainConfig:
    """Over 400,000 tokens with loss, each seen once, in rows of 8,192: the model's limit."""
    return TrainConfig(
        workdir=RUN / "train",
        model=RUN / "SmolLM2-135M-Instruct",
        phases=(
            Phase(
                name="long_thought",
                examples=RUN / "examples.jsonl",
                steps=55,
                optim=OptimConfig(peak_lr=1e-4, warmup_fraction=0.1),
            ),
        ),
        heldout=RUN / "heldout.jsonl",
        row_tokens=8192,
        batch_rows=1,
        step=StepConfig(compute_dtype="float32", remat="matmuls"),  # on these CPUs bfloat16 is no faster
        save_every=4,
    )
