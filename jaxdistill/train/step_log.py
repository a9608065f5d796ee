"""What each step reports: written down and shown while the next one runs."""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from jaxdistill.metrics import MetricsLog
from jaxdistill.train import watch
from jaxdistill.train.bad_steps import Guard

_OF_THE_GUARD = ("good", "usual_norm")  # `bad_steps.jsonl` holds them, for the steps where they matter


class StepLog:
    """What each step reports, written down while the next one runs.

    Args:
      guard: is shown every step before it is logged.
      show: called with a step's number and a line about it.
      tell: called with what there is to say of a bad step.
      peak_flops: FLOP/s of all devices together.
      every: steps between rows of metrics; the last step has one in any case.
    """

    def __init__(
        self,
        log: MetricsLog,
        guard: Guard,
        show: Callable[[int, str], None],
        tell: Callable[[str], None],
        learning_rate: Callable[[Any], Any],
        flops_per_token: float,
        peak_flops: float,
        every: int,
        last: int,
    ):
        self._log, self._guard, self._show, self._tell, self._learning_rate = log, guard, show, tell, learning_rate
        self._mfu_of_rate = flops_per_token / peak_flops
        self._every, self._last = every, last
        self._waiting: tuple[int, Mapping[str, Any], Mapping[str, float], Sequence[str]] | None = None
        self._settled = time.perf_counter()

    def restart_clock(self) -> None:
        """What was done since the last step was settled is no part of the next one's time."""
        self._settled = time.perf_counter()

    @property
    def devices_wait(self) -> bool:
        """Whether the step in flight is done, if there is one: the devices have nothing to do."""
        return self._waiting is None or self._waiting[1]["loss"].is_ready()

    def add(self, number: int, values: Mapping[str, Any], facts: Mapping[str, float], ids: Sequence[str]) -> None:
        """Takes a step that has just been started, and settles the one before.

        Args:
          values: scalars still on the devices: what `Guard.look` takes, and others to log.
          facts: numbers known beforehand: "tokens" and others to log.
          ids: of the batch's documents.
        """
        self.settle()
        self._waiting = number, values, facts, ids

    def settle(self) -> None:
        """Waits for the step in flight, if there is one, and logs it.

        Raises:
          BadStepError: as `Guard.look`.
        """
        if self._waiting is None:
            return
        number, values, facts, ids = self._waiting
        self._waiting = None
        numbers = {name: float(value) for name, value in values.items()}
        learning_rate = float(self._learning_rate(number - 1))
        if bad := self._guard.look(number, numbers, learning_rate, ids):
            self._tell(bad)
        now = time.perf_counter()
        seconds, self._settled = now - self._settled, now
        rate = facts["tokens"] / seconds
        mfu = self._mfu_of_rate * rate
        if number % self._every == 0 or number == self._last or bad:
            known = {name: x for name, x in numbers.items() if name not in _OF_THE_GUARD and math.isfinite(x)}
            speed = {"step_s": seconds, "tokens_per_s": rate, "mfu": mfu, **watch.memory_peaks()}
            skipped = {"skipped": 1.0} if bad else {}
            self._log.write(number, **known, **facts, learning_rate=learning_rate, **speed, **skipped)
        self._show(number, f"loss {numbers['loss']:.4f}  {rate:,.0f} tok/s  {seconds:.2f} s/step  MFU {mfu:.1%}")
