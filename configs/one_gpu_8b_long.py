"""Qwen3-8B in full on one H100 with rows of half a million tokens.

    XLA_PYTHON_CLIENT_MEM_FRACTION=0.97 jaxdistill train configs/one_gpu_8b_long.py
    jaxdistill plan configs/one_gpu_8b_long.py --hardware h100 --documents 8

Hardware: one GPU with 80 GB and 180 GB of host memory that it can pin; planned, never run: 73.5 GiB of 79 on the GPU
and 168 GiB on the host. That is 0.7 GiB more than the margin that `plan` leaves, so it says no. Weights and moments are
bfloat16, rounded stochastically; the moments and each layer's input wait in the host's memory, the MLP works on a
stretch of the row at a time. cuDNN's offsets end at 524,287 tokens of 32 heads. Qwen3-8B has 40,960 positions, so the
context is extended by a larger RoPE base.
"""

from pathlib import Path

from jaxdistill.models.context import ContextExtension
from jaxdistill.optim import OptimConfig
from jaxdistill.train.config import Phase, TrainConfig
from jaxdistill.train.step import StepConfig


def config() -> TrainConfig:
    """One row in a step."""
    return TrainConfig(
        workdir=Path("runs/one_gpu_8b_long"),
        model=Path("Qwen3-8B"),
        context=ContextExtension(positions=500_000, rope_theta=20_000_000.0),
        phases=(
            Phase(
                name="distilled",
                examples=Path("runs/examples/examples.jsonl"),
                epochs=3,
                optim=OptimConfig(peak_lr=1e-5, state_dtype="bfloat16"),
            ),
        ),
        row_tokens=500_000,
        batch_rows=1,
        step=StepConfig(remat="offload_inputs", offload_moments=True),
    )
