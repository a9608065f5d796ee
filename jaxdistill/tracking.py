"""Where a run's numbers go besides metrics.jsonl: TensorBoard, Weights & Biases, MLflow, by one small interface."""

import importlib
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Literal, Protocol, runtime_checkable

from tensorboardX import summary
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto import event_pb2, summary_pb2

from jaxdistill.errors import UserError

Name = Literal["tensorboard", "wandb", "mlflow"]
_FLUSH_S = 30.0


@runtime_checkable
class Tracker(Protocol):
    """Takes the numbers of one phase."""

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Takes the numbers of a step; a step may come again, and more than once."""

    def close(self) -> None:
        """Writes what is not written yet."""


class TensorBoard:
    """Event files in `tensorboard` of the phase's folder.

    Written by the caller, not by tensorboardX's thread: that one dies on a full disk, and who writes next waits for it.
    """

    def __init__(self, folder: Path):
        (folder / "tensorboard").mkdir(parents=True, exist_ok=True)
        # Its own name has seconds: a run started again at once would write over the file before
        self._events = EventsWriter(str(folder / "tensorboard" / "events"), f".{os.getpid()}.{time.time_ns()}")
        self._flushed = time.monotonic()

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """See `Tracker`."""
        scalars = [scalar for name, value in values.items() for scalar in summary.scalar(name, value).value]
        whole = summary_pb2.Summary(value=scalars)  # type: ignore[attr-defined]
        event = event_pb2.Event(wall_time=time.time(), step=step, summary=whole)  # type: ignore[attr-defined]
        self._events.write_event(event)
        if time.monotonic() - self._flushed > _FLUSH_S:
            self._events.flush()
            self._flushed = time.monotonic()

    def close(self) -> None:
        """See `Tracker`."""
        self._events.close()


class WandB:
    """A Weights & Biases run named after the phase's folder; its own environment variables say project and mode."""

    def __init__(self, folder: Path):
        name = f"{folder.parent.name}/{folder.name}"
        run_id = name.replace("/", "-")  # the same after a restart, which goes on with it
        self._run = _package("wandb").init(dir=str(folder), name=name, id=run_id, resume="allow")

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """See `Tracker`. W&B refuses steps that go back, so the step is a number like the others."""
        self._run.log({**values, "step": step})

    def close(self) -> None:
        """See `Tracker`."""
        self._run.finish()


class MLflow:
    """An MLflow run named after the phase's folder; its own environment variables say where."""

    def __init__(self, folder: Path):
        package, name = _package("mlflow"), f"{folder.parent.name}/{folder.name}"
        self._client, kept = package.MlflowClient(), folder / "mlflow_run"
        if kept.is_file():  # of a run that goes on
            self._id = kept.read_text(encoding="utf-8")
            return
        experiment = os.environ.get("MLFLOW_EXPERIMENT_NAME", "jaxdistill")
        found = self._client.get_experiment_by_name(experiment)
        where = found.experiment_id if found else self._client.create_experiment(experiment)
        self._id = self._client.create_run(where, run_name=name).info.run_id
        kept.write_text(self._id, encoding="utf-8")

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """See `Tracker`."""
        for name, value in values.items():
            self._client.log_metric(self._id, name, value, step=step)

    def close(self) -> None:
        """See `Tracker`."""
        self._client.set_terminated(self._id)


_KINDS: Mapping[Name, Callable[[Path], Tracker]] = {"tensorboard": TensorBoard, "wandb": WandB, "mlflow": MLflow}


def check(names: tuple[Name, ...]) -> None:
    """Refuses trackers whose package is not there, before a run has begun.

    Raises:
      UserError: one is not installed.
    """
    for name in names:
        if name != "tensorboard":
            _package(name)


def opened(names: tuple[Name, ...], folder: Path) -> list[Tracker]:
    """The trackers of a phase, by the folder that it writes to."""
    return [_KINDS[name](folder) for name in names]


def _package(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ImportError:
        raise UserError(f"track: {name} is not installed here; pip install {name}, or leave it out") from None
