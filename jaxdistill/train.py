"""Supervised fine-tuning in phases: the loop around the step that logs, saves and resumes."""

import dataclasses
import hashlib
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import grain
import jax
import jax.numpy as jnp
import numpy as np
import optax
from rich.console import Console
from rich.progress import BarColumn, TextColumn, TimeRemainingColumn

from jaxdistill import chips, manifest, metrics, optim, runtime, sharding
from jaxdistill.checkpoint import Checkpoints, fingerprint, keep_base, newest_input
from jaxdistill.data import chat, loader
from jaxdistill.data.packing import Batch
from jaxdistill.errors import PreemptedError, UserError
from jaxdistill.evaluate.live import Live, numbers
from jaxdistill.models import quantized
from jaxdistill.models.attention import backends
from jaxdistill.progress import Progress
from jaxdistill.train_config import Phase, TrainConfig, check_decontaminated, check_fits, read_architecture
from jaxdistill.train_step import (
    State,
    abstract_state,
    check_memory,
    make_heldout_loss,
    make_step,
    new_state,
    place,
)
from jaxdistill.trained import Trained

_COLUMNS = (
    TextColumn("{task.description}"),
    BarColumn(),
    TextColumn("{task.completed}/{task.total}  {task.fields[note]}"),
    TimeRemainingColumn(),
)
_ESTIMATE_S = 3600.0  # seconds of steps that the time left is estimated from; rich's 30 hold not one long step


def main(config: TrainConfig) -> dict[str, Any]:
    """Trains all phases, resuming where an earlier call stopped; returns what the manifest holds under "phases".

    Raises:
      PreemptedError: after SIGTERM, once the next step is saved.
    """
    with jax.set_mesh(config.mesh.build()), runtime.Preemption() as preemption:
        return Run(config, preemption).all_phases()


@dataclasses.dataclass(frozen=True)
class _Stage:
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


class Run:
    """A training run on the current mesh, in one process or in several: all compute, the first one writes and talks."""

    def __init__(self, config: TrainConfig, preemption: runtime.Preemption, console: Console | None = None):
        self.config = config
        self.workdir = config.workdir
        self.base, self.c = read_architecture(config)
        mesh = jax.sharding.get_mesh()
        sizes, device = dict(mesh.shape), mesh.devices.flat[0]
        attention = check_fits(config, self.c, sizes, device)
        quantized.check(config.step.matmul_dtype, device)
        self.projections = quantized.describe(config.step.matmul_dtype, device)
        self.trained = Trained(config, self.c)
        check_memory(config.step, {memory.kind for memory in jax.local_devices()[0].addressable_memories()})
        self.tokenizer = chat.load_tokenizer(self.base)
        self.preemption, self.leads = preemption, runtime.leads()
        self.console = console or Console(stderr=True, quiet=not self.leads)
        chip = chips.of_device(device.device_kind)
        if chip and chip.platform == "tpu" and (warning := sharding.reduced_whole(self.c.sizes(), sizes, chip.name)):
            self.console.print(f"[yellow]{warning}[/yellow]")
        self.peak, self.peak_source = metrics.peak_flops(jnp.dtype(config.step.compute_dtype))
        lost = [str(phase.examples) for phase in config.phases if not phase.examples.is_file()]
        if lost:
            raise UserError(f"no such file: {', '.join(lost)}; expected JSON Lines files of examples")
        self.heldout = self._prepare(config.heldout) if config.heldout else None
        live = config.evaluate
        self.live = Live(live, self.base, self.c, config.step.compute_dtype) if live.every else None
        self.stages = self._stages()
        packed = [stage.rows for stage in self.stages] + ([self.heldout] if self.heldout else [])
        segments = 1 + max(len(row) for rows in packed for row in rows.rows)
        self.attention = dataclasses.replace(attention, segments=segments)
        self.heldout_loss = make_heldout_loss(config.step, self.attention, self.c)

    def _prepare(self, path: Path) -> loader.PackedSet:
        shows = self.leads and self.console.is_terminal
        return loader.prepare(path, self.tokenizer, self.config.row_tokens, self.c.vocab, shows)

    def _stages(self) -> list[_Stage]:
        """All phases, read and checked before anything is written: a mistake in the last one shows at once."""
        config, stages, parent = self.config, [], fingerprint(self.config.model)
        check_decontaminated(config)
        context = dataclasses.asdict(config.context) if config.context else None
        for phase in config.phases:
            rows = self._prepare(phase.examples)
            steps = phase.optimizer_steps(len(rows), config.batch_rows)
            origin = {
                "model": parent,
                "context": context,
                "data": rows.fingerprint(),
                "steps": steps,
                "batch_rows": config.batch_rows,
                "deal_window": config.deal_window,
                "seed": config.seed,
                "optim": dataclasses.asdict(phase.optim),
                **({"lora": dataclasses.asdict(config.lora)} if config.lora.rank else {}),
            }
            origin = json.loads(json.dumps(origin, default=str))  # as a checkpoint gives it back
            parent = hashlib.sha256(json.dumps(origin, sort_keys=True).encode()).hexdigest()
            optimizer = optim.make(phase.optim, steps, self.trained.template)
            stages.append(_Stage(phase, self.workdir / phase.name, rows, steps, optimizer, origin))
            _check_earlier(stages[-1])
        return stages

    def all_phases(self) -> dict[str, Any]:
        """Runs what is left of each phase in turn."""
        config, model, done = self.config, self.config.model, {}
        runtime.meet("all inputs are checked")  # and nothing is written before
        if self.leads:
            manifest.write_config(self.workdir, config)
        for stage in self.stages:
            done[stage.name] = self.one_phase(stage, model)
            model = stage.folder
        if self.leads:
            self._write_manifest(done)
        runtime.meet("all is written")
        return done

    def _write_manifest(self, phases: Mapping[str, Any]) -> None:
        config = self.config
        heldout = [config.heldout] if config.heldout else []
        inputs = [self.base / "config.json", *(p.examples for p in config.phases), *heldout]
        origin = {name: self.stages[0].origin[name] for name in ("model", "context")}
        how = {"attention": backends.describe(self.attention.backend), "projections": self.projections}
        devices = f"{jax.device_count()} x {jax.devices()[0].device_kind}"
        facts = {**origin, "devices": devices, "mfu_formula": metrics.MFU_FORMULA, "peak": self.peak_source, **how}
        manifest.write_manifest(self.workdir, "train", inputs, {}, phases=phases, **facts)

    def one_phase(self, stage: _Stage, model: Path) -> dict[str, Any]:
        """Trains one phase from `model` to its last step, or from its newest checkpoint."""
        config, rows, folder = self.config, stage.rows, stage.folder
        if self.leads:
            loader.write_receipts(folder / "dropped.jsonl", rows.dropped)
            if self.heldout is not None:
                loader.write_receipts(folder / "heldout_dropped.jsonl", self.heldout.dropped)
            keep_base(self.base, folder, config.context)
        checkpoints = Checkpoints(folder, config.keep)
        epochs = math.ceil(stage.steps * config.batch_rows / len(rows))
        batches = loader.batches(rows, config.batch_rows, epochs, config.seed, config.deal_window)
        log = metrics.MetricsLog(folder, self.leads)
        try:
            state = self._start(stage, checkpoints, batches, model, log)
            self._describe(stage, int(state.step))
            state = self._loop(state, stage, batches, checkpoints, log, self.trained.facts(model))
            heldout = self._log_heldout(stage.steps, getattr(state, state.result_name), log)
        finally:
            checkpoints.close()
            log.close()
        return {
            "steps": stage.steps,
            "examples": len(rows.documents),
            "dropped": len(rows.dropped),
            "rows": len(rows),
            "padding_fraction": rows.padding_fraction,
            "loss_tokens_per_epoch": rows.trained_tokens,
            "heldout_loss": heldout,
        }

    def _start(
        self,
        stage: _Stage,
        checkpoints: Checkpoints,
        batches: grain.DatasetIterator,
        model: Path,
        log: metrics.MetricsLog,
    ) -> State:
        """The newest checkpoint's state, with the input moved to its place; or a new state from `model`."""
        newest, dtype = checkpoints.latest_step, jnp.dtype(stage.phase.optim.state_dtype)
        average, offload = stage.phase.optim.average_decay > 0, self.config.step.offload_moments
        self.trained.read(model)
        if newest is None:
            state = new_state(self.trained.first(model, dtype), stage.optimizer, self.config.seed, average, offload)
            self._log_heldout(0, state.params, log)
            self._log_task(0, state.params, stage, log)
            return state
        like = abstract_state(self.trained.template, stage.optimizer, dtype, average, offload)
        state, stored = checkpoints.restore(newest, like)
        batches.set_state(stored["position"])
        self.console.print(f"resumed from step {newest}")
        return state

    def _describe(self, stage: _Stage, start: int) -> None:
        rows = stage.rows
        self.console.print(
            f"[bold]{stage.name}[/bold]: {self.trained}; {len(rows.documents)} examples "
            f"in {len(rows)} rows of {rows.row_tokens} ({rows.padding_fraction:.1%} padding), "
            f"{len(rows.dropped)} dropped as longer than a row; steps {start} to {stage.steps}"
        )
        self.console.print(f"{metrics.MFU_FORMULA}; peak {self.peak / 1e9:,.0f} GFLOP/s ({self.peak_source})")
        self.console.print(f"attention: {backends.describe(self.attention.backend)}")
        if self.config.step.matmul_dtype != "compute":
            self.console.print(f"projections in {self.projections}; MFU counts against the peak above all the same")

    def _loop(
        self,
        state: State,
        stage: _Stage,
        batches: grain.DatasetIterator,
        checkpoints: Checkpoints,
        log: metrics.MetricsLog,
        beside: Mapping[str, Any],
    ) -> State:
        """Steps to the end; the metrics of a step are read while the next one runs."""
        config, steps, start = self.config, stage.steps, int(state.step)
        decay = stage.phase.optim.average_decay
        train_step = make_step(config.step, self.attention, self.c, stage.optimizer, decay, self.trained.lora)
        with Progress(*_COLUMNS, console=self.console, speed_estimate_period=_ESTIMATE_S) as bar:
            task = bar.add_task(stage.name, total=steps, completed=start, note="compiling")
            steps_log = metrics.StepLog(
                stage.name,
                log,
                lambda number, note: bar.update(task, completed=number, note=note),
                optim.schedule(stage.phase.optim, steps),
                flops_per_token=self.trained.flops_per_token(stage.rows.attended_tokens),
                peak_flops=jax.device_count() * self.peak,
                every=config.log_every,
                last=steps,
            )
            for number in range(start + 1, steps + 1):
                batch, ids = next(batches)
                placed = place(batch, config.step.accumulate)
                if number == start + 1:
                    sharding.check_replicas(state.params, "weights")
                    sharding.check_replicas(placed, "batch")
                state, values = train_step(state, placed, *self.trained.frozen)
                steps_log.add(number, values, self._facts(batch), ids)
                preempted = self.preemption.reached()
                if number % config.save_every == 0 or number == steps or preempted:
                    steps_log.settle()  # a state is saved only after its loss was seen to be finite
                    place_in_input = {"position": batches.get_state(), "origin": stage.origin}
                    checkpoints.save(number, state, {**place_in_input, "result": state.result_name, **beside})
                if self.live and not preempted and (number % config.evaluate.every == 0 or number == steps):
                    steps_log.settle()
                    self._log_task(number, getattr(state, state.result_name), stage, log)
                    steps_log.restart_clock()
                if preempted:
                    raise PreemptedError(f"preempted: step {number} of {stage.name} is saved; run it again to go on")
        return state

    def _facts(self, batch: Batch) -> dict[str, float]:
        """Tokens of a batch, its share of padding, and how unevenly its FLOPs fall on the data-parallel ranks."""
        tokens, mesh = np.count_nonzero(batch.segments), jax.sharding.get_mesh().shape
        flops_per_position = self.trained.flops_per_token(batch.lengths.mean(-1, dtype=np.float64))  # of each row
        by_rank = flops_per_position.reshape(self.config.step.accumulate, mesh["data"] * mesh["fsdp"], -1).sum(-1)
        return {
            "tokens": float(tokens),
            "padding_fraction": 1 - tokens / batch.segments.size,
            "flop_imbalance": metrics.flop_imbalance(by_rank),
        }

    def _log_task(self, step: int, params: Any, stage: _Stage, log: metrics.MetricsLog) -> None:
        """Scores of the task that is run while training."""
        if self.live is None:
            return
        summary = self.live.run(self.trained.merged(params), stage.folder / "evaluations", step)
        log.write(step, **numbers(summary))
        self.console.print(f"{self.config.evaluate.task} at step {step}: {summary.accuracy}")

    def _log_heldout(self, step: int, params: Any, log: metrics.MetricsLog) -> float | None:
        """Token-mean loss on the held-out examples."""
        if self.heldout is None:
            return None
        params, rows = self.trained.whole(params), self.config.batch_rows // self.config.step.accumulate
        total, weight = 0.0, 0.0
        with Progress(*_COLUMNS, console=self.console, transient=True) as bar:
            task = bar.add_task("held-out", total=math.ceil(len(self.heldout) / rows), note="")
            for batch, _ in loader.batches(self.heldout, rows, epochs=1, seed=0):
                loss, tokens = self.heldout_loss(params, place(batch))
                total, weight = total + float(loss), weight + float(tokens)
                bar.update(task, advance=1)
        if not weight:
            raise UserError(f"{self.config.heldout}: every example that fits a row has weight 0; expected some above")
        log.write(step, heldout_loss=total / weight)
        self.console.print(f"held-out loss at step {step}: {total / weight:.4f} nats/token")
        return total / weight


def _check_earlier(stage: _Stage) -> None:
    """Refuses to go on from a checkpoint of other data, another model or another schedule."""
    found = newest_input(stage.folder)
    if found is None:
        return
    step, stored = found
    changed = [name for name, value in stage.origin.items() if stored.get("origin", {}).get(name) != value]
    if changed:
        raise UserError(
            f"{stage.folder} was trained to step {step} with another value of: {', '.join(changed)}; going on would "
            "mix the two without a word. Restore it, or use another workdir (with this phase as its model to go on)"
        )
