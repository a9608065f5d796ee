"""What each part of the recipe is worth, on the demo's task: five variants, three seeds, 1,900 chains each, 15 runs.

    jaxdistill sweep configs/sweep_ablations.py

Hardware: CPUs. `benchmarks/sweeps.py` runs it and draws the figure of docs/experiments.md.
"""

from pathlib import Path

from jaxdistill.demo.material import MaterialConfig
from jaxdistill.evaluate.config import EvaluateConfig
from jaxdistill.optim import OptimConfig
from jaxdistill.sample.request import SamplingConfig
from jaxdistill.sweep.config import SweepConfig, Variant
from jaxdistill.train.config import Phase, TrainConfig
from jaxdistill.train.step import StepConfig

MATERIAL = Path("runs/sweep_material")  # shared with sweep_data_size.py
OPTIM = OptimConfig(peak_lr=1.5e-3, warmup_fraction=0.05, weight_decay=0.01)


def phase(name: str) -> Phase:
    """Two passes over a set of the material."""
    return Phase(name=name, examples=MATERIAL / name / "examples.jsonl", epochs=2, optim=OPTIM)


FIRST, SECOND = phase("reformatted"), phase("distilled")


def config() -> SweepConfig:
    """The teacher is wrong in a fifth of its answers, so that there is something to verify."""
    return SweepConfig(
        workdir=Path("runs/sweep_ablations"),
        material=MaterialConfig(workdir=MATERIAL, wrong=0.2, ablations=True),
        variants=(
            Variant(name="full", phases=(FIRST, SECOND)),
            Variant(name="no_phase_1", phases=(SECOND,)),
            Variant(name="no_reformat", phases=(phase("solutions"), SECOND)),
            Variant(name="no_verification", phases=(FIRST, phase("unverified"))),
            Variant(name="shorter_chains", phases=(FIRST, phase("shorter"))),
        ),
        data_sizes=(1900,),
        seeds=(0, 1, 2),
        train=TrainConfig(
            workdir=Path("runs/sweep_ablations"),
            model=MATERIAL / "student",
            phases=(FIRST, SECOND),
            heldout=MATERIAL / "heldout/examples.jsonl",
            row_tokens=384,
            batch_rows=2,
            deal_window=1,
            step=StepConfig(compute_dtype="float32", remat="none", attention="blockwise"),
        ),
        evaluate=EvaluateConfig(
            workdir=Path("runs/sweep_ablations"),
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
