"""What each step reports: written down and shown while the next one runs."""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from jaxdistill import watch
from jaxdistill.errors import RunError
from jaxdistill.metrics import MetricsLog


class NonFiniteLossError(RunError):
    """Training stopped: the loss or its gradient was not finite. The last checkpoint is from before."""


class StepLog:
    """What each step reports, written down while the next one runs.

    Args:
      show: called with a step's number and a line about it.
      peak_flops: FLOP/s of all devices together.
      every: steps between rows of metrics; the last step has one in any case.
    """

    def __init__(
        self,
        phase: str,
        log: MetricsLog,
        show: Callable[[int, str], None],
        learning_rate: Callable[[Any], Any],
        flops_per_token: float,
        peak_flops: float,
        every: int,
        last: int,
    ):
        self._phase, self._log, self._show, self._learning_rate = phase, log, show, learning_rate
        self._mfu_of_rate = flops_per_token / peak_flops
        self._every, self._last = every, last
        self._waiting: tuple[int, Mapping[str, Any], Mapping[str, float], Sequence[str]] | None = None
        self._settled = time.perf_counter()

    def restart_clock(self) -> None:
        """What was done since the last step was settled is no part of the next one's time."""
        self._settled = time.perf_counter()

    def add(self, number: int, values: Mapping[str, Any], facts: Mapping[str, float], ids: Sequence[str]) -> None:
        """Takes a step that has just been started, and settles the one before.

        Args:
          values: scalars still on the devices: "loss", "grad_norm" and others to log.
          facts: numbers known beforehand: "tokens" and others to log.
          ids: of the batch's documents.
        """
        self.settle()
        self._waiting = number, values, facts, ids

    def settle(self) -> None:
        """Waits for the step in flight, if there is one, and logs it.

        Raises:
          NonFiniteLossError: its loss or gradient is not finite.
        """
        if self._waiting is None:
            return
        number, values, facts, ids = self._waiting
        self._waiting = None
        numbers = {name: float(value) for name, value in values.items()}
        rate_of_learning = float(self._learning_rate(number - 1))
        # The loss is of the weights before this step; the gradient norm tells whether those after it are sound
        if not (math.isfinite(numbers["loss"]) and math.isfinite(numbers["grad_norm"])):
            raise NonFiniteLossError(
                f"step {number} of {self._phase}: the loss is {numbers['loss']} and the gradient norm "
                f"{numbers['grad_norm']} (learning rate {rate_of_learning:.3g}); the batch held {', '.join(ids)}. "
                "Checkpoints up to the step before are intact: look at those documents, or lower optim.peak_lr or "
                "optim.clip_norm in another workdir, with this phase as its model"
            )
        now = time.perf_counter()
        seconds, self._settled = now - self._settled, now
        rate = facts["tokens"] / seconds
        mfu = self._mfu_of_rate * rate
        if number % self._every == 0 or number == self._last:
            speed = {"step_s": seconds, "tokens_per_s": rate, "mfu": mfu, **watch.memory_peaks()}
            self._log.write(number, **numbers, **facts, learning_rate=rate_of_learning, **speed)
        self._show(number, f"loss {numbers['loss']:.4f}  {rate:,.0f} tok/s  {seconds:.2f} s/step  MFU {mfu:.1%}")
