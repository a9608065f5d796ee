"""The loop of one phase: steps that are logged, saved and evaluated, to the last one or until preempted."""

import contextlib
import dataclasses
import functools
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import grain
import jax
import optax
from rich.console import Console
from rich.progress import BarColumn, TextColumn, TimeRemainingColumn

from jaxdistill import metrics, optim, runtime, sharding
from jaxdistill.checkpoint_store import Checkpoints
from jaxdistill.data import loader
from jaxdistill.errors import PreemptedError
from jaxdistill.evaluate.live import Live, numbers
from jaxdistill.models.attention import Attention
from jaxdistill.progress import Progress, warn
from jaxdistill.train import profiling, watch
from jaxdistill.train.bad_steps import Guard
from jaxdistill.train.config import Phase, TrainConfig
from jaxdistill.train.goodput import Goodput
from jaxdistill.train.heldout import Heldout
from jaxdistill.train.step import State, make_step, place
from jaxdistill.train.step_log import StepLog
from jaxdistill.train.trained import Trained

_COLUMNS = (
    TextColumn("{task.description}"),
    BarColumn(),
    TextColumn("{task.completed}/{task.total}  {task.fields[note]}"),
    TimeRemainingColumn(),
)
_ESTIMATE_S = 3600.0  # seconds of steps that the time left is estimated from; rich's 30 hold not one long step


@dataclasses.dataclass(frozen=True)
class Stage:
    """A phase with its data, ready to be trained."""

    phase: Phase
    folder: Path
    rows: loader.PackedSet
    steps: int
    optimizer: optax.GradientTransformation
    origin: Mapping[str, Any]  # what its checkpoints stand on: starting weights, rows in their order, schedule

    @property
    def name(self) -> str:
        return self.phase.name


@dataclasses.dataclass(frozen=True, kw_only=True)
class Loop:
    """What the steps of a phase are made with, and who hears of them."""

    config: TrainConfig
    trained: Trained
    stage: Stage
    beside: Mapping[str, Any]  # what its checkpoints hold beside state and input
    attention: Attention
    peak_flops: float  # FLOP/s of a device
    checkpoints: Checkpoints
    fast: Checkpoints | None
    log: metrics.MetricsLog
    heldout: Heldout | None
    live: Live | None
    goodput: Goodput
    watched: watch.Watch
    preemption: runtime.Preemption
    console: Console

    def evaluate(self, step: int, params: Any) -> None:
        """Scores of the task that is run while training, with these trained weights."""
        if self.live is None:
            return
        with self.goodput.on("evaluation"):
            summary = self.live.run(self.trained.merged(params), self.stage.folder / "evaluations", step)
        self.log.write(step, **numbers(summary))
        self.console.print(f"{self.config.evaluate.task} at step {step}: {summary.accuracy}")

    def measure(self, step: int, params: Any) -> float | None:
        """The held-out loss with these trained weights, where there are such rows."""
        if self.heldout is None:
            return None
        with self.goodput.on("evaluation"):
            return self.heldout.measure(step, self.trained.whole(params), self.log)

    def to_the_end(self, state: State, batches: grain.DatasetIterator) -> tuple[State, float | None]:
        """The state after the last step, and the held-out loss if it was measured there.

        The metrics of a step are read while the next one runs.

        Raises:
          PreemptedError: after SIGTERM, once the next step is saved.
          BadStepError: as `bad_steps.Guard.look`.
        """
        config, stage, last, start = self.config, self.stage, self.stage.steps, int(state.step)
        c, decay = self.trained.c, stage.phase.optim.average_decay
        train_step = make_step(
            config.step, self.attention, c, stage.optimizer, decay, self.trained.lora, config.bad_steps
        )
        loss = None
        with (
            profiling.profile(stage.folder, config.profile_steps) as profile,
            Progress(*_COLUMNS, console=self.console, speed_estimate_period=_ESTIMATE_S) as bar,
        ):
            steps_log = self._steps_log(bar, start)
            for number in range(start + 1, last + 1):
                dealt = self._next(batches, steps_log, number == start + 1)
                placed = place(dealt.batch, config.step.accumulate)
                if number == start + 1:
                    sharding.check_replicas(state.params, "weights")
                    sharding.check_replicas(placed, "batch")
                if profile.starts_at(number):
                    steps_log.settle()
                    profile.start()
                # The first call compiles before it returns
                with self.goodput.on("compile") if number == start + 1 else contextlib.nullcontext():
                    state, values = train_step(state, placed, *self.trained.frozen)
                self.goodput.turn_to("steps")
                steps_log.add(number, values, self._facts(dealt), dealt.ids)
                preempted = self.preemption.reached()
                if profile.ends_at(number):
                    steps_log.settle()
                    profile.stop()
                    self.console.print(f"profile of steps {config.profile_steps}: {profile.folder}", soft_wrap=True)
                if number % config.save_every == 0 or number == last or preempted:
                    steps_log.settle()  # a state is saved only after its loss was seen to be finite
                    loss = self._save(number, state, batches)
                    steps_log.restart_clock()
                elif self.fast and number % config.fast.every == 0 and not runtime.anywhere(self.checkpoints.busy):
                    steps_log.settle()
                    self._write(self.fast, number, state, batches)
                    steps_log.restart_clock()
                if self.live and not preempted and (number % config.evaluate.every == 0 or number == last):
                    steps_log.settle()
                    self.evaluate(number, getattr(state, state.result_name))
                    steps_log.restart_clock()
                if preempted:
                    raise PreemptedError(f"preempted: step {number} of {stage.name} is saved; run it again to go on")
        return state, loss

    def _save(self, number: int, state: State, batches: grain.DatasetIterator) -> float | None:
        """Saves a step; measures the held-out loss before, where checkpoints are kept by it."""
        loss = None
        if self.config.retention.keep_best:
            loss = self.measure(number, getattr(state, state.result_name))
        if self.fast:
            with self.goodput.on("checkpoint"):
                self.fast.wait()  # Orbax numbers its saves in one row, and is asked for one at a time
        self._write(self.checkpoints, number, state, batches, loss)
        return loss

    def _write(
        self,
        place: Checkpoints,
        number: int,
        state: State,
        batches: grain.DatasetIterator,
        heldout_loss: float | None = None,
    ) -> None:
        position = {"position": batches.get_state(), "origin": self.stage.origin, "result": state.result_name}
        with self.goodput.on("checkpoint"):
            place.save(number, state, {**position, **self.beside}, heldout_loss)
        self.goodput.saved(number)

    def _steps_log(self, bar: Progress, start: int) -> StepLog:
        task = bar.add_task(self.stage.name, total=self.stage.steps, completed=start, note="compiling")

        def show(number: int, note: str) -> None:
            bar.update(task, completed=number, note=note)
            self.watched.beat(self.stage.name, number)
            if (seconds := self.goodput.first_step()) is not None:
                self.console.print(f"first step {seconds:.1f} s after the launch")

        return StepLog(
            self.log,
            Guard(self.config.bad_steps, self.stage.name, self.stage.folder, runtime.leads()),
            show,
            functools.partial(warn, self.console),
            optim.schedule(self.stage.phase.optim, self.stage.steps),
            flops_per_token=self.trained.flops_per_token(self.stage.rows.attended_tokens),
            peak_flops=jax.device_count() * self.peak_flops,
            every=self.config.log_every,
            last=self.stage.steps,
        )

    def _next(self, batches: grain.DatasetIterator, steps_log: StepLog, first: bool) -> loader.Dealt:
        """The next batch; the wait for it counts where the devices are idle when it comes."""
        started = time.perf_counter()
        dealt = next(batches)
        if not first and steps_log.devices_wait:
            self.goodput.wasted("input", time.perf_counter() - started)
        return dealt

    def _facts(self, dealt: loader.Dealt) -> dict[str, float]:
        """Tokens of a batch, its share of padding, and how unevenly its FLOPs fall on the data-parallel ranks."""
        config, mesh = self.config, jax.sharding.get_mesh().shape
        flops_per_position = self.trained.flops_per_token(dealt.squares / config.row_tokens)  # of each row
        by_rank = flops_per_position.reshape(config.step.accumulate, mesh["data"] * mesh["fsdp"], -1).sum(-1)
        return {
            "tokens": float(dealt.tokens),
            "padding_fraction": 1 - dealt.tokens / (config.batch_rows * config.row_tokens),
            "flop_imbalance": metrics.flop_imbalance(by_rank),
        }
