"""`jaxdistill train ... --replay PHASE:STEP`: a step done again from the checkpoint before, held against its record."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import grain

from jaxdistill import metrics
from jaxdistill.errors import UserError
from jaxdistill.models.attention import Attention
from jaxdistill.train.config import TrainConfig
from jaxdistill.train.loop import Stage
from jaxdistill.train.step import State, make_step, place
from jaxdistill.train.trained import Trained

_NUMBERS = ("loss", "grad_norm")


def find(stages: Sequence[Stage], model: Path, wanted: str) -> tuple[Stage, Path, int]:
    """The stage and the step that "PHASE:STEP" means, and the model which that stage starts from.

    Args:
      model: that the first one starts from.

    Raises:
      UserError: there is no such step.
    """
    name, _, step = wanted.rpartition(":")
    for stage in stages:
        if stage.name == name and step.isdigit() and 1 <= int(step) <= stage.steps:
            return stage, model, int(step)
        model = stage.folder
    known = ", ".join(f"{stage.name}:1 to {stage.name}:{stage.steps}" for stage in stages)
    raise UserError(f"replay is {wanted!r}; expected PHASE:STEP, of {known}")


def again(
    config: TrainConfig,
    trained: Trained,
    stage: Stage,
    attention: Attention,
    state: State,
    batches: grain.DatasetIterator,
    step: int,
) -> dict[str, Any]:
    """What a step gives after those that lead to it from a state, beside what the run wrote of it.

    The same bits on the mesh and the number of hosts that it was recorded with.
    """
    start, decay = int(state.step), stage.phase.optim.average_decay
    train_step = make_step(config.step, attention, trained.c, stage.optimizer, decay, trained.lora, config.bad_steps)
    ids: tuple[str, ...] = ()
    numbers: dict[str, float] = {}
    for _ in range(start, step):
        batch, ids, *_ = next(batches)
        state, values = train_step(state, place(batch, config.step.accumulate), *trained.frozen)
        numbers = {name: float(values[name]) for name in _NUMBERS}
    return {
        "phase": stage.name,
        "step": step,
        "from_step": start,
        **{name: value if math.isfinite(value) else str(value) for name, value in numbers.items()},
        "recorded": _recorded(stage.folder, step),
        "documents": list(ids),
    }


def _recorded(folder: Path, step: int) -> dict[str, float]:
    """What the run wrote of a step's numbers; nothing where it did not come so far, or logs other steps alone."""
    if not (folder / "metrics.jsonl").is_file():
        return {}
    rows = {row["step"]: row for row in metrics.read(folder)}
    return {name: rows[step][name] for name in _NUMBERS if name in rows.get(step, {})}


def in_words(facts: Mapping[str, Any]) -> str:
    """One line about what `again` found."""
    words = f"{facts['phase']} step {facts['step']}, done again from step {facts['from_step']}: "
    words += ", ".join(f"{name} {facts[name]}" for name in _NUMBERS)
    if not facts["recorded"]:
        return f"{words}; no finite number of it was recorded"
    same = all(facts[name] == value for name, value in facts["recorded"].items())
    return f"{words}: {'as it was recorded' if same else 'NOT as recorded, ' + str(facts['recorded'])}"
