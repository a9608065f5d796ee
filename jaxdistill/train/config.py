"""The configuration of a training run, and what is checked before its data is tokenized or its weights are read."""

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxdistill import hf, manifest, models, sharding, sources, tracking
from jaxdistill.checkpoint import base_of
from jaxdistill.checkpoint_retention import FAST_TIER, LIMIT_S, RETENTION, FastTier, Retention
from jaxdistill.data.prepared import BadRows
from jaxdistill.errors import UserError
from jaxdistill.evaluate.live import LiveConfig
from jaxdistill.models import quantized
from jaxdistill.models.attention import Attention, backends
from jaxdistill.models.config import Config
from jaxdistill.models.context import ContextExtension
from jaxdistill.models.lora import LoraConfig
from jaxdistill.optim import OptimConfig
from jaxdistill.sharding import MeshConfig
from jaxdistill.train import profiling
from jaxdistill.train.bad_steps import BAD_STEPS, BadStepsConfig
from jaxdistill.train.step import StepConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class Phase:
    """One stretch of training with its own data, schedule and fresh optimizer state."""

    name: str  # also the name of its folder
    examples: Path  # path or URL (gs://, s3://, hf://, https://) of Example rows: .jsonl, .parquet or .array_record
    epochs: int = 1  # passes over the packed rows
    steps: int | None = None  # optimizer steps, instead of epochs
    optim: OptimConfig = OptimConfig()

    def __post_init__(self):
        if not self.name or "/" in self.name or self.name.startswith("."):
            raise UserError(f"a phase is named {self.name!r}; expected a name that can be a folder")
        if self.epochs < 1 or (self.steps is not None and self.steps < 1):
            raise UserError(f"phase {self.name}: epochs is {self.epochs} and steps {self.steps}; expected 1 or more")

    def optimizer_steps(self, rows: int, batch_rows: int) -> int:
        """Steps of this phase on so many packed rows."""
        return self.steps or math.ceil(rows * self.epochs / batch_rows)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """A fine-tuning run: model -> phases -> checkpoints."""

    workdir: Path  # run folder; run again with the same one to resume
    model: Path  # Hugging Face folder, or a phase folder of another run
    phases: tuple[Phase, ...] = (Phase(name="sft", examples=Path("examples.jsonl")),)  # one after another
    context: ContextExtension | None = None  # for rows longer than the model was made for; the export has it too
    evaluation_sets: tuple[Path, ...] = ()  # the model's tests; every example must have been checked against these
    allow_contamination: bool = False  # train although the manifests do not say that it was
    heldout: Path | None = None  # Example rows whose loss is measured before, between and after
    lora: LoraConfig = LoraConfig()  # adapters that are trained in place of all weights
    evaluate: LiveConfig = LiveConfig()  # a task that is run on the weights as they are trained
    bad_rows: BadRows = "stop"  # what rows that cannot be used do: end the run, or are left out with a receipt each
    prepared: Path | None = None  # folder for tokenized examples, to share them among runs; by default in the workdir
    row_tokens: int = 8192  # T, positions in a packed row
    batch_rows: int = 8  # rows in an optimizer step, over all devices
    deal_window: int = 16  # steps that trade rows, so that those of a step cost alike; 1 is a plain shuffle
    mesh: MeshConfig = MeshConfig()
    step: StepConfig = StepConfig()
    seed: int = 0  # of the order of rows, and of noise
    save_every: int = 100  # steps between checkpoints
    save_limit_s: float = LIMIT_S  # seconds that writing one may take
    fast: FastTier = FAST_TIER  # others between them, on each host's own disk
    retention: Retention = RETENTION  # which of them stay, of each phase
    log_every: int = 1  # steps between rows of metrics
    track: tuple[tracking.Name, ...] = ("tensorboard",)  # who gets them besides metrics.jsonl: wandb and mlflow as well
    bad_steps: BadStepsConfig = BAD_STEPS
    silence_s: float = 1800.0  # seconds without a step until each host writes where all its threads hang
    profile_steps: str | None = None  # first and last step of each phase, as a:b, to write an XProf trace of
    replay: str | None = None  # PHASE:STEP of this run to do again from the checkpoint before; nothing is trained

    def __post_init__(self):
        if not self.phases or len({p.name for p in self.phases}) < len(self.phases):
            raise UserError(f"phases are named {[p.name for p in self.phases]}; expected at least one, all different")
        for name in ("row_tokens", "batch_rows", "deal_window", "save_every", "log_every"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name)}; expected 1 or more")
        for name in ("save_limit_s", "silence_s"):
            if getattr(self, name) <= 0:
                raise UserError(f"{name} is {getattr(self, name)}; expected more than 0")
        if self.profile_steps is not None:
            profiling.span(self.profile_steps)
        tracking.check(self.track)
        if self.retention.keep_best and self.heldout is None:
            raise UserError("retention.keep_best goes by the held-out loss, but heldout names no file; name one")
        if self.batch_rows % self.step.accumulate:
            raise UserError(f"batch_rows {self.batch_rows} is not a multiple of step.accumulate {self.step.accumulate}")


def read_architecture(config: TrainConfig) -> tuple[Path, Config]:
    """The folder with the model's config.json and tokenizer, and the architecture, its context extended if asked."""
    base = base_of(config.model)
    c, values = hf.read_config(base)
    if config.context is not None:
        c = models.family(c.model_type).config(config.context.apply(values))
    return base, c


def check_fits(config: TrainConfig, c: Config, mesh: Mapping[str, int], device: Any) -> Attention:
    """Refuses rows, a model or heads that a mesh of these sizes cannot split evenly; returns how attention is computed.

    Args:
      device: one of the mesh; it may be one that a program is only compiled for.

    Raises:
      UserError: rows are longer than the model's positions, something does not come out even, or attention has no
        backend here.
    """
    if config.row_tokens > c.max_positions:
        raise UserError(
            f"row_tokens is {config.row_tokens}, but {config.model} was made for {c.max_positions} positions "
            "(max_position_embeddings); use shorter rows, or extend its context (--help: context)"
        )
    rows, ways = config.batch_rows // config.step.accumulate, mesh["data"] * mesh["fsdp"]
    if rows % ways:
        raise UserError(
            f"{rows} rows at a time (batch_rows / step.accumulate) do not split over data {mesh['data']} x fsdp "
            f"{mesh['fsdp']}; make them a multiple of {ways}"
        )
    chunks = 2 * mesh["context"] if mesh["context"] > 1 else 1  # sharding.row_order
    if config.row_tokens % chunks:
        raise UserError(f"row_tokens {config.row_tokens} is not a multiple of twice mesh.context {mesh['context']}")
    sharding.check_divisible(c.sizes(), mesh)
    step = config.step
    step.balance(c)
    quantized.check_model(step.matmul_dtype, c)
    attention = Attention(backend=backends.choose(step.attention, device.platform), context=step.context)
    backends.check(attention, c, mesh, rows, config.row_tokens, step.compute_dtype, device)
    return attention


def check_decontaminated(config: TrainConfig) -> None:
    """Refuses examples that were not checked against the evaluation sets of the configuration.

    Raises:
      UserError: a set is missing, or by the manifests an examples file did not come through `jaxdistill curate` (or
        `refine import`) with it.
    """
    for held in config.evaluation_sets:
        sources.check(held, "evaluation problems, of which evaluation_sets names files")
    if config.allow_contamination or not config.evaluation_sets:
        return
    hashes = {held: manifest.file_hash(held) for held in config.evaluation_sets}
    for phase in config.phases:
        cleared = manifest.cleared_of(phase.examples)  # reads all that the examples came from
        for held, hash_ in hashes.items():
            if hash_ not in cleared:
                raise UserError(
                    f"{phase.examples} was not checked against {held}, by its manifests; run `jaxdistill curate` (or "
                    "`jaxdistill refine import`) with it among its evaluation_sets, or say --allow-contamination"
                )
