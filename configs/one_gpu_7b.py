"""Qwen2.5-7B in full on one H100: every weight trained, rows of 32,768 tokens.

    XLA_PYTHON_CLIENT_MEM_FRACTION=0.92 jaxdistill train configs/one_gpu_7b.py
    jaxdistill plan configs/one_gpu_7b.py --hardware h100

Hardware: one GPU with 80 GB and 32 GB of host memory that it can pin; planned, never run: 55 GiB of 79 on the GPU and
28 GiB on the host. Weights and moments are bfloat16, rounded stochastically; the moments wait in the host's memory.
"""

from pathlib import Path

from jaxdistill.optim import OptimConfig
from jaxdistill.train.config import Phase, TrainConfig
from jaxdistill.train.step import StepConfig


def config() -> TrainConfig:
    """One row in a step: gradients that are added up over several are float32, and 28 GiB more."""
    return TrainConfig(
        workdir=Path("runs/one_gpu_7b"),
        model=Path("Qwen2.5-7B-Instruct"),
        phases=(
            Phase(
                name="distilled",
                examples=Path("runs/examples/examples.jsonl"),
                epochs=3,
                optim=OptimConfig(peak_lr=1e-5, state_dtype="bfloat16"),
            ),
        ),
        row_tokens=32_768,
        batch_rows=1,
        step=StepConfig(remat="attention", offload_moments=True),
    )
