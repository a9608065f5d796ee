"""A grid as runs: what each is called, and the configurations of its training and evaluation."""

import dataclasses
import itertools
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from jaxdistill.errors import UserError
from jaxdistill.evaluate.config import EvaluateConfig
from jaxdistill.sweep.config import SweepConfig
from jaxdistill.train.config import TrainConfig

RUNS = "runs"  # folder of the runs, in that of the sweep


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
    """One point of the grid."""

    name: str
    settings: Mapping[str, Any]  # its value on each axis
    folder: Path
    train: TrainConfig
    evaluate: EvaluateConfig
    source: Path  # examples of the last phase, of which it may take a part
    data_size: int | None  # examples of that part; None: all
    chain_tokens: int | None  # tokens of the longest of them; None: whatever there is

    @property
    def takes_part(self) -> bool:
        """Whether the last phase is trained on a part of its examples."""
        return self.data_size is not None or self.chain_tokens is not None

    def identity(self) -> dict[str, Any]:
        """What its result depends on, by dotted names: all that it is told but where it is written."""
        told = {"settings": self.settings, "train": dataclasses.asdict(self.train), "source": self.source}
        told["evaluate"] = dataclasses.asdict(self.evaluate)
        values = dict(_flat("", json.loads(json.dumps(told, default=str))))
        return {name: value for name, value in values.items() if str(self.folder) not in str(value)}


def _flat(name: str, value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict | list) and value:
        for key, one in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _flat(f"{name}.{key}" if name else str(key), one)
    else:
        yield name, value


# Axis of the configuration -> column of the table, and how its values are written in the names of runs.
_AXES = {
    "variants": ("variant", lambda value: value.name),
    "models": ("model", lambda value: value.name),
    "data_sizes": ("data_size", lambda value: f"n{value}"),
    "chain_tokens": ("chain_tokens", lambda value: f"t{value}"),
    "peak_lrs": ("peak_lr", lambda value: f"lr{value:g}"),
    "epochs": ("epochs", lambda value: f"e{value}"),
    "seeds": ("seed", lambda value: f"s{value}"),
}
COLUMNS = tuple(column for column, _ in _AXES.values())


def runs_of(config: SweepConfig) -> list[Run]:
    """All runs, the seeds of one setting beside each other.

    A name is made of the run's own values and of nothing else, so that a grid may grow: n400-lr0.001-s0.
    """
    given = {axis: getattr(config, axis) for axis in _AXES if getattr(config, axis)}
    return [_run(config, dict(zip(given, point, strict=True))) for point in itertools.product(*given.values())]


def chosen(config: SweepConfig) -> Run:
    """The run that is to be done alone.

    Raises:
      UserError: there is none of that name.
    """
    runs = {run.name: run for run in runs_of(config)}
    if config.run not in runs:
        raise UserError(f"run is {config.run!r}; this sweep has {len(runs)} runs, such as {', '.join([*runs][:3])}")
    return runs[config.run]


def _run(config: SweepConfig, point: Mapping[str, Any]) -> Run:
    name = "-".join(_AXES[axis][1](value) for axis, value in point.items())
    folder = config.workdir / RUNS / name
    train, seed = config.train, point["seeds"]
    phases = point["variants"].phases if "variants" in point else train.phases
    if (peak_lr := point.get("peak_lrs")) is not None:
        optims = (dataclasses.replace(phase.optim, peak_lr=peak_lr) for phase in phases)
        phases = tuple(dataclasses.replace(p, optim=optim) for p, optim in zip(phases, optims, strict=True))
    last, changes = phases[-1], {}
    size, longest = point.get("data_sizes"), point.get("chain_tokens")
    if size is not None or longest is not None:
        changes["examples"] = folder / "data" / "examples.jsonl"
    if (epochs := point.get("epochs")) is not None:
        changes["epochs"] = epochs
    phases = (*phases[:-1], dataclasses.replace(last, **changes))
    model = point.get("models", train.model)
    shown = {"variants": "name", "models": "name"}
    return Run(
        name=name,
        settings={_AXES[a][0]: getattr(v, shown[a]) if a in shown else v for a, v in point.items()},
        folder=folder,
        train=dataclasses.replace(train, workdir=folder / "train", model=model, phases=phases, seed=seed),
        evaluate=dataclasses.replace(
            config.evaluate, workdir=folder / "evaluate", model=(folder / "train" / last.name,), seed=seed
        ),
        source=last.examples,
        data_size=size,
        chain_tokens=longest,
    )
