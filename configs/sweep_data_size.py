"""How much a student learns from how many verified chains: the demo's task, eight sizes, three seeds, 24 runs.

    jaxdistill sweep configs/sweep_data_size.py
    jaxdistill fit runs/sweep_data_size/table.jsonl --y heldout_loss --relative

Hardware: CPUs. `benchmarks/sweeps.py` runs it and draws the figures of docs/experiments.md.
"""

from pathlib import Path

from jaxdistill.demo.material import MaterialConfig
from jaxdistill.evaluate.config import EvaluateConfig
from jaxdistill.optim import OptimConfig
from jaxdistill.sample.request import SamplingConfig
from jaxdistill.sweep.config import SweepConfig
from jaxdistill.train.config import Phase, TrainConfig
from jaxdistill.train.step import StepConfig

MATERIAL = Path("runs/sweep_material")  # shared with sweep_ablations.py
OPTIM = OptimConfig(peak_lr=1.5e-3, warmup_fraction=0.05, weight_decay=0.01)


def config() -> SweepConfig:
    """Phase 2 alone: a random student on chains, two passes over however many there are."""
    return SweepConfig(
        workdir=Path("runs/sweep_data_size"),
        material=MaterialConfig(workdir=MATERIAL, wrong=0.2, ablations=True),
        data_sizes=(100, 200, 300, 500, 800, 1200, 1600, 1900),
        seeds=(0, 1, 2),
        train=TrainConfig(
            workdir=Path("runs/sweep_data_size"),
            model=MATERIAL / "student",
            phases=(Phase(name="distilled", examples=MATERIAL / "distilled/examples.jsonl", epochs=2, optim=OPTIM),),
            heldout=MATERIAL / "heldout/examples.jsonl",
            row_tokens=384,
            batch_rows=2,
            deal_window=1,
            step=StepConfig(compute_dtype="float32", remat="none", attention="blockwise"),
        ),
        evaluate=EvaluateConfig(
            workdir=Path("runs/sweep_data_size"),
            model=(MATERIAL / "student",),
            task="problems",
            path=MATERIAL / "problems/heldout.jsonl",
            prompt="{problem}",
            samples=2,
            sampling=SamplingConfig(temperature=0.5, max_new_tokens=192),
            slots=200,
            compute_dtype="float32",
        ),
    )
