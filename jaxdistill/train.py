"""Supervised fine-tuning in phases: the step, and the loop around it that logs, saves and resumes."""

import dataclasses
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import grain
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import struct
from jaxtyping import Array, Int, PRNGKeyArray
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from jaxdistill import hf, manifest, metrics, optim, sharding, weights
from jaxdistill.checkpoint import Checkpoints, base_of, keep_base, load_model
from jaxdistill.data import chat, loader
from jaxdistill.data.packing import Batch
from jaxdistill.errors import UserError
from jaxdistill.loss import cross_entropy_sum
from jaxdistill.models import decoder
from jaxdistill.models.config import Config
from jaxdistill.optim import OptimConfig
from jaxdistill.sharding import MeshConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class Phase:
    """One stretch of training with its own data, schedule and fresh optimizer state."""

    name: str  # also the name of its folder
    examples: Path  # path of a JSON Lines file of Example rows
    epochs: int = 1  # passes over the packed rows
    steps: int | None = None  # optimizer steps, instead of epochs
    optim: OptimConfig = OptimConfig()


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """A fine-tuning run: model -> phases -> checkpoints."""

    workdir: Path  # run folder; run again with the same one to resume
    model: Path  # Hugging Face folder, or a phase folder of another run
    phases: tuple[Phase, ...] = (Phase(name="sft", examples=Path("examples.jsonl")),)  # one after another
    heldout: Path | None = None  # Example rows whose loss is measured before, between and after
    row_tokens: int = 8192  # T, positions in a packed row
    batch_rows: int = 8  # rows in an optimizer step, over all devices
    accumulate: int = 1  # pieces a batch is worked off in, to save memory; the result is the same
    mesh: MeshConfig = MeshConfig()
    compute_dtype: Literal["bfloat16", "float32"] = "bfloat16"  # of activations; weights and moments are float32
    remat: decoder.Remat = "full"  # what the backward pass finds saved
    neftune_alpha: float = 0.0  # noise on the embeddings (arXiv 2310.05914); 0 is none
    seed: int = 0  # of the order of rows, and of noise
    save_every: int = 100  # steps between checkpoints
    keep: int = 2  # newest checkpoints kept of each phase
    log_every: int = 1  # steps between rows of metrics

    def __post_init__(self):
        if not self.phases or len({p.name for p in self.phases}) < len(self.phases):
            raise UserError(f"phases are named {[p.name for p in self.phases]}; expected at least one, all different")
        for name in ("row_tokens", "batch_rows", "accumulate", "save_every", "keep", "log_every"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name)}; expected 1 or more")
        if self.batch_rows % self.accumulate:
            raise UserError(f"batch_rows {self.batch_rows} is not a multiple of accumulate {self.accumulate}")
        check_mesh_rows(self.mesh, self.batch_rows // self.accumulate, self.row_tokens)


def check_mesh_rows(mesh: MeshConfig, rows: int, row_tokens: int) -> None:
    """Refuses rows that the mesh cannot split evenly."""
    if rows % (mesh.data * mesh.fsdp):
        raise UserError(
            f"{rows} rows at a time (batch_rows / accumulate) do not split over data {mesh.data} x fsdp {mesh.fsdp}; "
            f"make them a multiple of {mesh.data * mesh.fsdp}"
        )
    if row_tokens % mesh.context:
        raise UserError(f"row_tokens {row_tokens} is not a multiple of mesh.context {mesh.context}")


@struct.dataclass
class State:
    """All of a run that changes from step to step, apart from its place in the input.

    Leaves are arrays, or what stands in for them while Orbax compares trees: hence no array annotations.
    """

    step: Any  # int32 []
    params: decoder.Params
    opt_state: optax.OptState
    key: Any  # random key [], split by folding in the step


def new_state(params: decoder.Params, optimizer: optax.GradientTransformation, seed: int) -> State:
    """The state before the first step; every array is on the mesh, replicated where it is not a weight."""
    step, key = sharding.replicate(jnp.zeros((), jnp.int32)), sharding.replicate(jax.random.key(seed))
    return State(step=step, params=params, opt_state=jax.jit(optimizer.init)(params), key=key)


def loss_sum(params: decoder.Params, batch: Batch, c: Config, dtype: Any, remat: decoder.Remat, noise: Any) -> Array:
    """Weighted negative log-likelihood of packed rows [B, T], summed over tokens."""
    x = decoder.hidden(params, batch.tokens, batch.positions, batch.segments, c, dtype, remat, noise)
    return cross_entropy_sum(x, decoder.head(params), batch.targets, batch.weights)


def neftune_noise(key: PRNGKeyArray, lengths: Int[Array, "B T"], alpha: float, c: Config, dtype: Any) -> Any:
    """Uniform noise of scale alpha / sqrt(document length x D), as in arXiv 2310.05914, section 2."""
    shape = (*lengths.shape, c.embed)
    uniform = jax.random.uniform(key, shape, dtype, -1.0, 1.0, out_sharding=sharding.spec("BTD"))
    return uniform * (alpha * jax.lax.rsqrt(jnp.maximum(lengths, 1) * float(c.embed)))[..., None].astype(dtype)


def make_step(
    config: TrainConfig, c: Config, optimizer: optax.GradientTransformation
) -> Callable[[State, Batch], tuple[State, dict[str, Array]]]:
    """The jitted training step. Batches are [accumulate, B, T]; the old state's memory is reused.

    The loss is the mean over the global batch's weighted tokens: pieces are summed and divided once.
    """
    dtype = jnp.dtype(config.compute_dtype)

    def piece_loss(params: decoder.Params, piece: Batch, key: PRNGKeyArray, total: Array) -> Array:
        alpha = config.neftune_alpha
        noise = neftune_noise(key, piece.lengths, alpha, c, dtype) if alpha else None
        return loss_sum(params, piece, c, dtype, config.remat, noise) / total

    def step(state: State, batch: Batch) -> tuple[State, dict[str, Array]]:
        total = jnp.maximum(jnp.sum(batch.weights), 1e-6)
        key = jax.random.fold_in(state.key, state.step)

        def piece(carry: tuple[Array, Any], item: tuple[Batch, Array]) -> tuple[tuple[Array, Any], None]:
            rows, i = item
            loss, grads = jax.value_and_grad(piece_loss)(state.params, rows, jax.random.fold_in(key, i), total)
            return jax.tree.map(jnp.add, carry, (loss, grads)), None

        if config.accumulate == 1:
            rows = jax.tree.map(lambda a: a[0], batch)
            loss, grads = jax.value_and_grad(piece_loss)(state.params, rows, key, total)
        else:
            zero = (jnp.zeros(()), jax.tree.map(jnp.zeros_like, state.params))
            (loss, grads), _ = jax.lax.scan(piece, zero, (batch, jnp.arange(config.accumulate)))
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)  # type: ignore[arg-type]
        params: Any = optax.apply_updates(state.params, updates)  # type: ignore[arg-type]
        new = dataclasses.replace(state, step=state.step + 1, params=params, opt_state=opt_state)
        return new, {"loss": loss, "grad_norm": optax.tree.norm(grads), "loss_tokens": total}

    return jax.jit(step, donate_argnums=0)


def make_heldout_loss(config: TrainConfig, c: Config) -> Callable[[decoder.Params, Batch], tuple[Array, Array]]:
    """The jitted (loss sum, weight sum) of one batch [B, T]."""
    dtype = jnp.dtype(config.compute_dtype)

    def sums(params: decoder.Params, batch: Batch) -> tuple[Array, Array]:
        return loss_sum(params, batch, c, dtype, "none", None), jnp.sum(batch.weights)

    return jax.jit(sums)


def place(batch: Batch, accumulate: int | None = None) -> Batch:
    """A host batch [rows, T] on the mesh, cut into [accumulate, B, T] if asked."""

    def put(x: Any) -> jax.Array:
        if accumulate is None:
            return sharding.put(x, "BT")
        return sharding.put(x.reshape(accumulate, -1, x.shape[-1]), "ABT")

    return jax.tree.map(put, batch)


class NonFiniteLossError(RuntimeError):
    """Training stopped: the loss or its gradient was not finite. The last checkpoint is from before."""


def main(config: TrainConfig) -> dict[str, Any]:
    """Trains all phases, resuming where an earlier call stopped; returns what the manifest holds under "phases"."""
    with jax.set_mesh(config.mesh.build()):
        return Run(config).all_phases()


class Run:
    """A training run on the current mesh."""

    def __init__(self, config: TrainConfig, console: Console | None = None):
        self.config = config
        self.workdir = config.workdir
        self.base = base_of(config.model)
        self.c, _ = hf.read_config(self.base)
        if config.row_tokens > self.c.max_positions:
            raise UserError(
                f"row_tokens is {config.row_tokens}, but {config.model} was made for {self.c.max_positions} positions "
                "(max_position_embeddings); use shorter rows"
            )
        self.template = decoder.template(self.c)
        sharding.check_divisible(self.c.sizes(), config.mesh.sizes(), sharding.STORAGE)
        self.tokenizer = chat.load_tokenizer(self.base)
        self.console = console or Console(stderr=True)
        self.peak, self.peak_source = metrics.peak_flops(jnp.dtype(config.compute_dtype))
        lost = [str(phase.examples) for phase in config.phases if not phase.examples.is_file()]
        if lost:
            raise UserError(f"no such file: {', '.join(lost)}; expected JSON Lines files of examples")
        self.heldout = self._prepare(config.heldout) if config.heldout else None
        self.heldout_loss = make_heldout_loss(config, self.c)

    def _prepare(self, path: Path) -> loader.PackedSet:
        return loader.prepare(path, self.tokenizer, self.config.row_tokens, self.console.is_terminal)

    def all_phases(self) -> dict[str, Any]:
        """Runs what is left of each phase in turn."""
        config = self.config
        manifest.write_config(self.workdir, config)
        model, done = config.model, {}
        for phase in config.phases:
            done[phase.name] = self.one_phase(phase, model)
            model = self.workdir / phase.name
        inputs = [self.base / "config.json", *(p.examples for p in config.phases)]
        manifest.write_manifest(
            self.workdir, "train", inputs, {}, phases=done, mfu_formula=metrics.MFU_FORMULA, peak=self.peak_source
        )
        return done

    def one_phase(self, phase: Phase, model: Path) -> dict[str, Any]:
        """Trains one phase from `model` to its last step, or from its newest checkpoint."""
        config, folder = self.config, self.workdir / phase.name
        rows = self._prepare(phase.examples)
        loader.write_receipts(folder / "dropped.jsonl", rows.dropped)
        steps = phase.steps or math.ceil(len(rows) * phase.epochs / config.batch_rows)
        epochs = math.ceil(steps * config.batch_rows / len(rows))
        optimizer = optim.make(phase.optim, steps, self.template)
        keep_base(self.base, folder)
        checkpoints = Checkpoints(folder, config.keep)
        batches = loader.batches(rows, config.batch_rows, epochs, config.seed)
        log = metrics.MetricsLog(folder)
        try:
            state = self._start(checkpoints, optimizer, batches, model, log)
            self._describe(phase, rows, steps, int(state.step))
            state = self._loop(state, steps, optimizer, batches, checkpoints, log, rows, phase)
            heldout = self._log_heldout(steps, state.params, log)
        finally:
            checkpoints.close()
            log.close()
        return {
            "steps": steps,
            "examples": len(rows.documents),
            "dropped": len(rows.dropped),
            "rows": len(rows),
            "padding_fraction": rows.padding_fraction,
            "loss_tokens_per_epoch": rows.trained_tokens,
            "heldout_loss": heldout,
        }

    def _start(
        self,
        checkpoints: Checkpoints,
        optimizer: optax.GradientTransformation,
        batches: grain.DatasetIterator,
        model: Path,
        log: metrics.MetricsLog,
    ) -> State:
        """The newest checkpoint's state, with the input moved to its place; or a new state from `model`."""
        newest = checkpoints.latest_step
        if newest is None:
            params, _ = load_model(model)
            state = new_state(params, optimizer, self.config.seed)
            self._log_heldout(0, state.params, log)
            return state
        like = weights.abstract(self.template)
        abstract = jax.eval_shape(lambda p: new_state(p, optimizer, self.config.seed), like)
        state, position = checkpoints.restore(newest, weights.on_mesh(abstract))
        batches.set_state(position)
        self.console.print(f"resumed from step {newest}")
        return state

    def _describe(self, phase: Phase, rows: loader.PackedSet, steps: int, start: int) -> None:
        self.console.print(
            f"[bold]{phase.name}[/bold]: {weights.count(self.template):,} parameters; {len(rows.documents)} examples "
            f"in {len(rows)} rows of {rows.row_tokens} ({rows.padding_fraction:.1%} padding), "
            f"{len(rows.dropped)} dropped as longer than a row; steps {start} to {steps}"
        )
        self.console.print(f"{metrics.MFU_FORMULA}; peak {self.peak / 1e9:,.0f} GFLOP/s ({self.peak_source})")

    def _loop(
        self,
        state: State,
        steps: int,
        optimizer: optax.GradientTransformation,
        batches: grain.DatasetIterator,
        checkpoints: Checkpoints,
        log: metrics.MetricsLog,
        rows: loader.PackedSet,
        phase: Phase,
    ) -> State:
        """Steps to the end; the metrics of a step are read while the next one runs."""
        config = self.config
        train_step = make_step(config, self.c, optimizer)
        learning_rate = optim.schedule(phase.optim, steps)
        flops_per_token = self.c.flops_per_token(rows.attended_tokens)
        waiting: tuple[int, dict[str, Array], int, tuple[str, ...]] | None = None
        last = time.perf_counter()

        def settle() -> None:
            """Waits for the step in flight, checks its loss and logs it."""
            nonlocal waiting, last
            if waiting is None:
                return
            number, values, tokens, ids = waiting
            waiting = None
            numbers = {name: float(value) for name, value in values.items()}
            # The loss is of the weights before this step; the gradient norm tells whether those after it are sound
            if not (math.isfinite(numbers["loss"]) and math.isfinite(numbers["grad_norm"])):
                raise NonFiniteLossError(
                    f"step {number} of {phase.name}: the loss is {numbers['loss']} and the gradient norm "
                    f"{numbers['grad_norm']} (learning rate {float(learning_rate(number - 1)):.3g}); the batch held "
                    f"{', '.join(ids)}. Checkpoints up to the step before are intact: look at those documents, "
                    "lower optim.peak_lr, or lower optim.clip_norm, and run again to resume"
                )
            now = time.perf_counter()
            seconds, last = now - last, now
            rate = tokens / seconds
            mfu = flops_per_token * rate / (jax.device_count() * self.peak)
            if number % config.log_every == 0 or number == steps:
                lr = float(learning_rate(number - 1))
                log.write(number, **numbers, learning_rate=lr, step_s=seconds, tokens_per_s=rate, mfu=mfu)
            bar.update(
                task,
                completed=number,
                note=f"loss {numbers['loss']:.4f}  {rate:,.0f} tok/s  {seconds:.2f} s/step  MFU {mfu:.1%}",
            )

        columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed}/{task.total}"))
        start = int(state.step)
        with Progress(*columns, TextColumn("{task.fields[note]}"), TimeRemainingColumn(), console=self.console) as bar:
            task = bar.add_task(phase.name, total=steps, completed=start, note="compiling")
            for number in range(start + 1, steps + 1):
                batch, ids = next(batches)
                state, values = train_step(state, place(batch, config.accumulate))
                settle()
                waiting = (number, values, int(np.count_nonzero(batch.segments)), ids)
                if number % config.save_every == 0 or number == steps:
                    settle()  # a state is saved only after its loss was seen to be finite
                    checkpoints.save(number, state, batches.get_state())
        return state

    def _log_heldout(self, step: int, params: decoder.Params, log: metrics.MetricsLog) -> float | None:
        """Token-mean loss on the held-out examples."""
        if self.heldout is None:
            return None
        rows = self.config.batch_rows // self.config.accumulate
        total, weight = 0.0, 0.0
        for batch, _ in loader.batches(self.heldout, rows, epochs=1, seed=0):
            loss, tokens = self.heldout_loss(params, place(batch))
            total, weight = total + float(loss), weight + float(tokens)
        log.write(step, heldout_loss=total / weight)
        self.console.print(f"held-out loss at step {step}: {total / weight:.4f} nats/token")
        return total / weight
