"""Supervised fine-tuning in phases: the loop around the step that logs, saves and resumes."""

import dataclasses
import functools
import hashlib
import json
import math
import shutil
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import grain
import jax
import jax.numpy as jnp
from rich.console import Console

from jaxdistill import chips, manifest, metrics, optim, runtime, sharding, sources
from jaxdistill.checkpoint import fingerprint, keep_base
from jaxdistill.checkpoint_retention import Retention
from jaxdistill.checkpoint_store import Checkpoints, newest_input, restore_newest
from jaxdistill.data import chat, loader, prepared
from jaxdistill.errors import LostHostError, RunError, UserError
from jaxdistill.evaluate.live import Live
from jaxdistill.models import quantized
from jaxdistill.models.attention import backends
from jaxdistill.progress import say, warn
from jaxdistill.train import goodput, replay, watch
from jaxdistill.train.config import TrainConfig, check_decontaminated, check_fits, read_architecture
from jaxdistill.train.goodput import Goodput
from jaxdistill.train.heldout import Heldout
from jaxdistill.train.loop import Loop, Stage
from jaxdistill.train.step import State, abstract_state, check_memory, new_state
from jaxdistill.train.trained import Trained


def main(config: TrainConfig) -> dict[str, Any]:
    """Trains all phases, resuming where an earlier call stopped; returns what the manifest holds under "phases".

    Raises:
      PreemptedError: after SIGTERM, once the next step is saved.
      BadStepError: a step's loss or gradient is not sound.
      LostHostError: another process of the job has ended without a word.
    """
    clock = Goodput(config.workdir, runtime.launched(), runtime.leads() and not config.replay)
    with jax.set_mesh(config.mesh.build()), runtime.Preemption() as preemption:
        run = Run(config, preemption, clock)
        return run.replayed(config.replay) if config.replay else run.all_phases()


class Run:
    """A training run on the current mesh, in one process or in several: all compute, the first one writes and talks."""

    def __init__(self, config: TrainConfig, preemption: runtime.Preemption, clock: Goodput):
        self.config, self.goodput = config, clock
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
        self.console = Console(stderr=True, quiet=not self.leads)
        chip = chips.of_device(device.device_kind)
        if chip and chip.platform == "tpu" and (warning := sharding.reduced_whole(self.c.sizes(), sizes, chip.name)):
            self.console.print(f"[yellow]{warning}[/yellow]")
        self.peak, self.peak_source = metrics.peak_flops(jnp.dtype(config.step.compute_dtype))
        paths = [phase.examples for phase in config.phases]
        lost = [f"{sources.name(path)}: {found}" for path in paths if (found := sources.wrong(path))]
        if lost:
            raise UserError(f"{', '.join(lost)}; expected JSON Lines files of examples")
        heldout = self._prepare(config.heldout) if config.heldout else None
        live = config.evaluate
        self.live = Live(live, self.base, self.c, config.step.compute_dtype) if live.every else None
        self.stages = self._stages()
        packed = [stage.rows for stage in self.stages] + ([heldout] if heldout else [])
        segments = 1 + max(rows.documents_of_fullest_row for rows in packed)
        self.attention = dataclasses.replace(attention, segments=segments)
        self.heldout = Heldout(config, heldout, self.attention, self.c, self.console) if heldout else None

    def _prepare(self, path: Path) -> loader.PackedSet:
        """The first process tokenizes what is not there yet; then all map the same files."""
        config, shows = self.config, self.leads and self.console.is_terminal
        cache = config.prepared or self.workdir / "prepared"
        sizes = config.row_tokens, self.c.vocab
        rows = runtime.first_alone(
            lambda: loader.prepare(path, self.tokenizer, *sizes, cache, shows, bad_rows=config.bad_rows)
        )
        if rows.wrong:
            warn(self.console, f"{prepared.in_words(path, rows.documents.wrong)}\nThey are left out")
        return rows

    def _stages(self) -> list[Stage]:
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
                **({"router_aux_loss_coef": balance} if (balance := config.step.balance(self.c)) else {}),
                **({"spikes": True} if config.bad_steps.spike else {}),  # a checkpoint then holds the usual norm
            }
            origin = json.loads(json.dumps(origin, default=str))  # as a checkpoint gives it back
            parent = hashlib.sha256(json.dumps(origin, sort_keys=True).encode()).hexdigest()
            optimizer = optim.make(phase.optim, steps, self.trained.template)
            stages.append(Stage(phase, self.workdir / phase.name, rows, steps, optimizer, origin))
            _check_earlier(stages[-1])
        return stages

    def all_phases(self) -> dict[str, Any]:
        """Runs what is left of each phase in turn."""
        config, model, done = self.config, self.config.model, {}
        runtime.meet("all inputs are checked")  # and nothing is written before
        if self.leads:
            manifest.write_config(self.workdir, config)
        with watch.Watch(self.workdir, config.silence_s, say) as watched:
            try:
                for stage in self.stages:
                    done[stage.name] = self.one_phase(stage, model, watched)
                    model = stage.folder
            except (RunError, UserError):
                raise
            except Exception as error:  # what a collective or a barrier raises that waits for a process in vain
                if jax.process_count() > 1 and (lost := watched.lost()):
                    raise LostHostError(f"{'; '.join(lost)}. Start all processes again: they go on together") from error
                raise
            finally:
                self.goodput.close()
        if self.leads:
            self._write_manifest(done)
        self.console.print(f"time: {goodput.in_words(self.goodput.facts())}", soft_wrap=True)
        runtime.meet("all is written")
        return done

    def _write_manifest(self, phases: Mapping[str, Any]) -> None:
        config = self.config
        c, of_data = self.base / "config.json", {s.phase.examples: s.rows for s in self.stages}
        if config.heldout and self.heldout:
            of_data[config.heldout] = self.heldout.rows
        # The hashes of what was trained on, whatever the files are by now
        inputs = {c: manifest.fingerprint(c), **{path: f"sha256:{rows.sha256}" for path, rows in of_data.items()}}
        origin = {name: self.stages[0].origin[name] for name in ("model", "context")}
        how = {"attention": backends.describe(self.attention.backend), "projections": self.projections}
        devices = f"{jax.device_count()} x {jax.devices()[0].device_kind}"
        facts = {**origin, "devices": devices, "mfu_formula": metrics.MFU_FORMULA, "peak": self.peak_source, **how}
        manifest.write_manifest(self.workdir, "train", inputs, {}, phases=phases, **facts)

    def one_phase(self, stage: Stage, model: Path, watched: watch.Watch) -> dict[str, Any]:
        """Trains one phase from `model` to its last step, or from its newest checkpoint."""
        config, rows, folder = self.config, stage.rows, stage.folder
        if self.leads:
            loader.write_receipts(folder / "dropped.jsonl", rows.dropped + rows.wrong)
            if self.heldout is not None:
                held = self.heldout.rows
                loader.write_receipts(folder / "heldout_dropped.jsonl", held.dropped + held.wrong)
            keep_base(self.base, folder, config.context)
        checkpoints = Checkpoints(folder, config.retention, config.save_limit_s)
        own = self._own_folder(stage)
        fast = Checkpoints(own, Retention(keep=2), config.save_limit_s, own=True) if own else None
        log = metrics.MetricsLog(folder, self.leads, config.track)
        loop = Loop(
            config=config,
            trained=self.trained,
            stage=stage,
            beside=self.trained.facts(model),
            attention=self.attention,
            peak_flops=self.peak,
            checkpoints=checkpoints,
            fast=fast,
            log=log,
            heldout=self.heldout,
            live=self.live,
            goodput=self.goodput,
            watched=watched,
            preemption=self.preemption,
            console=self.console,
        )
        try:
            with self.goodput.on("start-up"):
                state, batches = self.start(stage, [checkpoints, *([fast] if fast else [])], model)
                self.goodput.begin(stage.name, int(state.step))
            if not int(state.step):
                loop.measure(0, state.params)
                loop.evaluate(0, state.params)
            self._describe(stage, int(state.step))
            state, heldout = loop.to_the_end(state, batches)
            if heldout is None:
                heldout = loop.measure(stage.steps, getattr(state, state.result_name))
        finally:
            with self.goodput.on("checkpoint"):
                if fast:
                    fast.close()
                checkpoints.close()
            log.close()
        if own:
            # With what other processes of this host and earlier starts have left there
            shutil.rmtree(own.parent, ignore_errors=True)
        blocked_s = checkpoints.blocked_s + (fast.blocked_s if fast else 0)
        self._describe_checkpoints(stage, blocked_s, checkpoints.best_step)
        return {
            "steps": stage.steps,
            "examples": len(rows.items),
            "dropped": len(rows.dropped),
            "bad_rows": len(rows.wrong),
            "rows": len(rows),
            "padding_fraction": rows.padding_fraction,
            "loss_tokens_per_epoch": rows.trained_tokens,
            "heldout_loss": heldout,
        }

    def _own_folder(self, stage: Stage) -> Path | None:
        """Where this process keeps fast checkpoints of a phase; no other run, schedule or process finds them there."""
        if self.config.fast.folder is None:
            return None
        path = stage.folder / "fast"

        def named() -> str:
            if not path.is_file():
                manifest.write_json(path, uuid.uuid4().hex)
            return path.read_text(encoding="utf-8")

        facts = runtime.first_alone(named) + json.dumps(stage.origin, sort_keys=True)
        name = hashlib.sha256(facts.encode()).hexdigest()[:16]
        return self.config.fast.folder / name / f"{jax.process_index()}-of-{jax.process_count()}"

    def start(
        self, stage: Stage, places: Sequence[Checkpoints], model: Path, before: int | None = None
    ) -> tuple[State, grain.DatasetIterator]:
        """The state of the newest good checkpoint and the input at its place, or a new state from `model`.

        Args:
          before: the checkpoint is of a step below this one.
        """
        config, dtype, batches = self.config, jnp.dtype(stage.phase.optim.state_dtype), self.batches(stage)
        kind = (stage.phase.optim.average_decay > 0, config.step.offload_moments, config.bad_steps.spike is not None)
        self.trained.read(model)
        like = abstract_state(self.trained.template, stage.optimizer, dtype, *kind)
        found = restore_newest(places, like, functools.partial(warn, self.console), before)
        if found is None:
            return new_state(self.trained.first(model, dtype), stage.optimizer, config.seed, *kind), batches
        newest, state, stored = found
        batches.set_state(stored["position"])
        self.console.print(f"resumed from step {newest}")
        return state, batches

    def batches(self, stage: Stage) -> grain.DatasetIterator:
        """The input of a phase from its first step on; this process reads the rows that its devices hold a part of."""
        config, pieces = self.config, self.config.step.accumulate
        epochs = math.ceil(stage.steps * config.batch_rows / len(stage.rows))
        own = sharding.own_rows(pieces, config.batch_rows // pieces)
        return loader.batches(stage.rows, config.batch_rows, epochs, config.seed, config.deal_window, own)

    def replayed(self, wanted: str) -> dict[str, Any]:
        """Does the step "PHASE:STEP" again; what the run has written stays as it is."""
        stage, model, step = replay.find(self.stages, self.config.model, wanted)
        checkpoints = Checkpoints(stage.folder, read_only=True)
        try:
            state, batches = self.start(stage, [checkpoints], model, before=step)
        finally:
            checkpoints.close()
        facts = replay.again(self.config, self.trained, stage, self.attention, state, batches, step)
        if self.leads:
            path = self.workdir / "replays" / f"{stage.name}-{step}.json"
            manifest.write_json(path, facts)
            self.console.print(f"{replay.in_words(facts)}\nall of it: {path}", highlight=False, soft_wrap=True)
        return facts

    def _describe_checkpoints(self, stage: Stage, blocked_s: float, best_step: int | None) -> None:
        share = blocked_s / self.goodput.wall_s
        words = f"checkpoints of {stage.name}: held up {blocked_s:.1f} s ({share:.1%} of the time so far)"
        if best_step:
            words += f"; the lowest held-out loss was at step {best_step}"
        self.console.print(words, soft_wrap=True)

    def _describe(self, stage: Stage, start: int) -> None:
        rows = stage.rows
        self.console.print(
            f"[bold]{stage.name}[/bold]: {self.trained}; {len(rows.items)} examples "
            f"in {len(rows)} rows of {rows.row_tokens} ({rows.padding_fraction:.1%} padding), "
            f"{len(rows.dropped)} dropped as longer than a row, {len(rows.wrong)} as no examples; "
            f"steps {start} to {stage.steps}"
        )
        self.console.print(f"{metrics.MFU_FORMULA}; peak {self.peak / 1e9:,.0f} GFLOP/s ({self.peak_source})")
        self.console.print(f"attention: {backends.describe(self.attention.backend)}")
        if self.config.step.matmul_dtype != "compute":
            self.console.print(f"projections in {self.projections}; MFU counts against the peak above all the same")


def _check_earlier(stage: Stage) -> None:
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
