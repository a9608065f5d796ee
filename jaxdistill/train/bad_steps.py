"""What becomes of a step whose loss is no number or whose gradient is far too large: stop, or skip its batch."""

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jaxdistill.errors import RunError, UserError

_FIRST = 20  # steps whose gradient norms are only learned from: they fall fast at the start of a phase
_DECAY = 0.95  # of the usual norm: a mean over about 20 steps


@dataclasses.dataclass(frozen=True, kw_only=True)
class BadStepsConfig:
    """When a step is bad, and what is done about it."""

    policy: Literal["stop", "skip"] = "stop"  # skip leaves weights and moments as they were, and goes on
    spike: float | None = None  # a gradient norm this many times the usual one (mean of about 20 steps) is bad too
    in_a_row: int = 10  # bad steps that are skipped before the run stops after all

    def __post_init__(self):
        if self.in_a_row < 1 or (self.spike is not None and self.spike <= 1):
            raise UserError(f"{self}: expected a spike above 1 and in_a_row of 1 or more")


BAD_STEPS = BadStepsConfig()


class BadStepError(RunError):
    """Training stopped at a bad step. The last checkpoint is from before."""


def is_good(
    config: BadStepsConfig, loss: Float[Array, ""], norm: Float[Array, ""], usual: Float[Array, ""] | None, step: Array
) -> Bool[Array, ""]:
    """Whether a step is to be taken.

    Args:
      usual: what `usual_norm` makes of the steps before; None where no spike is looked for.
      step: how many those are, int32 [].
    """
    good = jnp.isfinite(loss) & jnp.isfinite(norm)
    if config.spike is not None and usual is not None:
        good &= (step < _FIRST) | (norm <= config.spike * usual)
    return good


def usual_norm(usual: Float[Array, ""], norm: Float[Array, ""], good: Bool[Array, ""], step: Array) -> Array:
    """The moving average of the norms of good steps, the plain mean while there are few; arguments as of `is_good`."""
    share = jnp.maximum(1 - _DECAY, 1 / (step.astype(jnp.float32) + 1))
    return jnp.where(good, usual + share * (norm - usual), usual)


class Guard:
    """The bad steps of a phase: each is written to `bad_steps.jsonl` with its documents, then skipped or the end.

    Args:
      writes: to disk; of several processes one does.
    """

    def __init__(self, config: BadStepsConfig, phase: str, folder: Path, writes: bool = True):
        self._config, self._phase, self._path, self._writes = config, phase, folder / "bad_steps.jsonl", writes
        self._in_a_row = 0

    def look(self, number: int, numbers: Mapping[str, float], learning_rate: float, ids: Sequence[str]) -> str:
        """What to tell of a step: nothing if it is good.

        Args:
          numbers: "loss", "grad_norm", and "good" and "usual_norm" where the step says so.
          ids: of the batch's documents.

        Raises:
          BadStepError: it is bad, and so by the policy the last one.
        """
        loss, norm = numbers["loss"], numbers["grad_norm"]
        # The loss is of the weights before this step; the gradient norm tells whether those after it are sound
        finite = math.isfinite(loss) and math.isfinite(norm)
        if finite and numbers.get("good", 1.0):
            self._in_a_row = 0
            return ""
        self._in_a_row += 1
        skips = self._config.policy == "skip" and self._in_a_row <= self._config.in_a_row
        usual = numbers.get("usual_norm", float("nan"))
        what = f"step {number} of {self._phase}: the loss is {loss} and the gradient norm {norm}"
        what += f" (usual: {usual:.3g}; learning rate {learning_rate:.3g})"
        self._write(number, loss, norm, usual, learning_rate, "skipped" if skips else "stopped", ids)
        if skips:
            return f"{what}; its batch is skipped, its {len(ids)} documents are in {self._path}"
        many = f", and so were the {self._in_a_row - 1} before" if self._in_a_row > 1 else ""
        raise BadStepError(
            f"{what}{many}; the batch held {_some(ids)} (all in {self._path}). Checkpoints up to the step before are "
            f"intact: look at those documents, run the step again with --replay {self._phase}:{number}, go on without "
            "such batches with --bad-steps.policy skip, or lower optim.peak_lr or optim.clip_norm in another workdir, "
            "with this phase as its model"
        )

    def _write(
        self, number: int, loss: float, norm: float, usual: float, rate: float, action: str, ids: Sequence[str]
    ) -> None:
        if not self._writes:
            return
        values: dict[str, Any] = {"loss": loss, "grad_norm": norm, "usual_norm": usual, "learning_rate": rate}
        shown = {name: value if math.isfinite(value) else str(value) for name, value in values.items()}
        with self._path.open("a", encoding="utf-8") as lines:
            lines.write(json.dumps({"step": number, "action": action, **shown, "documents": list(ids)}) + "\n")


def _some(ids: Sequence[str], count: int = 20) -> str:
    """The first ids; a batch of long rows may hold thousands."""
    rest = f" and {len(ids) - count} more" if len(ids) > count else ""
    return ", ".join(ids[:count]) + rest
