"""What a sweep is told: what all runs share, and the axes of the grid."""

import dataclasses
import re
from pathlib import Path
from typing import Literal

from jaxdistill.demo.material import MaterialConfig
from jaxdistill.errors import UserError
from jaxdistill.evaluate.config import EvaluateConfig
from jaxdistill.launch.run import Job
from jaxdistill.train.config import Phase, TrainConfig

_NAME = r"[A-Za-z0-9][A-Za-z0-9._]*"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Variant:
    """Phases in place of those that the runs share: other data, or a phase less."""

    name: str
    phases: tuple[Phase, ...]

    def __post_init__(self) -> None:
        if not re.fullmatch(_NAME, self.name) or not self.phases:
            raise UserError(
                f"a variant is named {self.name!r} and has {len(self.phases)} phases; expected a name of letters, "
                "digits, dots and underscores, and at least one phase"
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class SweepConfig:
    """A grid: every combination of the values of all axes that have some is one run, trained and evaluated."""

    workdir: Path  # folder of the sweep; run again with the same one to go on
    train: TrainConfig  # what the runs share; its workdir is not used
    evaluate: EvaluateConfig  # of each run's last phase; its model and workdir are not used
    variants: tuple[Variant, ...] = ()  # axis: phases on or off, or trained on other data
    models: tuple[Path, ...] = ()  # axis: models to start from
    data_sizes: tuple[int, ...] = ()  # axis: examples of the last phase, a choice by size and seed
    chain_tokens: tuple[int, ...] = ()  # axis: tokens of the longest example of the last phase; longer are left out
    peak_lrs: tuple[float, ...] = ()  # axis: learning rate of all phases
    epochs: tuple[int, ...] = ()  # axis: passes over the rows of the last phase
    seeds: tuple[int, ...] = (0,)  # axis: of the choice of examples, their order, and sampling
    material: MaterialConfig | None = None  # problems, chains and a student of the demo, made first
    run: str = ""  # name of the one run to do, as tasks of a job do; all by default
    gather: bool = False  # run nothing: the table of what is done
    target: Literal["here", "slurm", "jobset"] = "here"  # where to run: here, or as the job that is written
    launch: Job = Job()  # what that job is to have for each run: one process on one host
    at_once: int = 0  # most runs of that job at a time; 0: as many as there is room for
    keep_models: bool = True  # keep the checkpoints of runs that are evaluated

    def __post_init__(self) -> None:
        for name in ("data_sizes", "chain_tokens", "peak_lrs", "epochs"):
            values = getattr(self, name)
            if any(not value > 0 for value in values):
                raise UserError(f"{name} are {values}; expected numbers above 0")
        for name in ("variants", "models", "data_sizes", "chain_tokens", "peak_lrs", "epochs", "seeds"):
            values = getattr(self, name)
            if len(set(values)) < len(values):
                raise UserError(f"{name} are {values}; expected each of them once")
        for what, names in {
            "variants": [v.name for v in self.variants],
            "models": [m.name for m in self.models],
        }.items():
            if len(set(names)) < len(names):
                raise UserError(f"{what} are named {', '.join(names)}; expected different names: they name the runs")
        if not self.seeds:
            raise UserError("seeds are none; expected one or more")
        if self.epochs and any(phases[-1].steps for phases in (self.train.phases, *(v.phases for v in self.variants))):
            raise UserError("epochs are an axis, but the last phase is given steps, which win; leave one of them out")
        several = self.evaluate.thinking_limits or self.evaluate.waits
        if self.evaluate.asks or several or len(self.evaluate.model) != 1:
            raise UserError(
                "a sweep evaluates the model of each run and nothing else; expected one model to stand for it"
            )
        if self.at_once < 0:
            raise UserError(f"at_once is {self.at_once}; expected 0 or more")
