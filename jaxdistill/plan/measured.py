"""What a run measured of the step that is planned, for the plan to be held against."""

import dataclasses
import json
import statistics
from pathlib import Path
from typing import Any

from jaxdistill import metrics
from jaxdistill.errors import UserError
from jaxdistill.train.config import TrainConfig

_FIRST = 2  # rows of each phase left out: the first step's time has its compilation, and the next may wait for it
_SAME = ("row_tokens", "batch_rows", "mesh", "step", "lora")  # of both configurations, for a step to be the same work


@dataclasses.dataclass(frozen=True)
class Measured:
    """Steps of a run."""

    run: str
    steps: int  # those with a time, without the first of each phase
    step_s: float  # median


def read(run: Path, config: TrainConfig) -> Measured:
    """What a run folder's metrics say of the step that is planned.

    Raises:
      UserError: it holds no run, one of another step, or too few steps.
    """
    path = run / "config.json"
    if not path.is_file():
        raise UserError(f"{path} not found; expected the run folder of `jaxdistill train`")
    ran: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    planned = json.loads(json.dumps(dataclasses.asdict(config), default=str))
    if changed := [name for name in _SAME if _without_defaults(ran.get(name)) != _without_defaults(planned[name])]:
        raise UserError(
            f"{run} ran another step than the one planned: {', '.join(changed)} differ; plan with "
            + ", ".join(f"{name} {ran.get(name)}" for name in changed)
        )
    seconds: list[float] = []
    for phase in ran["phases"]:
        if (run / phase["name"] / "metrics.jsonl").is_file():
            rows = metrics.read(run / phase["name"])
            seconds += [row["step_s"] for row in rows if "step_s" in row][_FIRST:]
    if not seconds:
        raise UserError(f"{run} has no more than {_FIRST} timed steps in any phase; let it run on")
    return Measured(str(run), len(seconds), statistics.median(seconds))


def _without_defaults(value: Any) -> Any:
    """A part of a configuration without what was left to defaults: `mesh.data` is what the other axes leave."""
    return {k: v for k, v in value.items() if v is not None and k != "data"} if isinstance(value, dict) else value
