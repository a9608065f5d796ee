"""The paper's two phases: reformatted solutions first (the long format), distilled chains second (the long thought).

    jaxdistill train configs/two_phases.py --model Qwen2.5-1.5B-Instruct --mesh.fsdp 8

Hardware: 8 GPUs with 80 GB. Not run at this size yet: the same code at toy size is `make demo`. The inputs are what
`jaxdistill refine reformat` and `jaxdistill collect` + `jaxdistill examples` write; learning rate and epochs follow
common practice for this size, the paper does not give its own.
"""

from pathlib import Path

from jaxdistill.optim import OptimConfig
from jaxdistill.train.config import Phase, TrainConfig
from jaxdistill.train.step import StepConfig

OPTIM = OptimConfig(peak_lr=1e-5, warmup_fraction=0.03)


def config() -> TrainConfig:
    """Rows of 16,384 tokens, 16 in a step; a phase starts from the weights of the one before."""
    return TrainConfig(
        workdir=Path("runs/two_phases"),
        model=Path("Qwen2.5-1.5B-Instruct"),
        phases=(
            Phase(name="reformatted", examples=Path("runs/reformatted/examples.jsonl"), epochs=2, optim=OPTIM),
            Phase(name="distilled", examples=Path("runs/examples/examples.jsonl"), epochs=3, optim=OPTIM),
        ),
        row_tokens=16_384,
        batch_rows=16,
        step=StepConfig(accumulate=2, compute_dtype="bfloat16", remat="full"),
    )
