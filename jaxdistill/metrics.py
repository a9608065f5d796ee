"""What a run reports about itself: JSON Lines and TensorBoard, and model FLOPs utilization with its formula."""

import json
import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tensorboardX

from jaxdistill import chips
from jaxdistill.errors import RunError

MFU_FORMULA = (
    "MFU = FLOPs per token x tokens/s / (devices x peak); "
    "FLOPs per token = 6 x matmul weights (head included, embedding lookup not) "
    "+ 6 x layers x heads x head_dim x document length (attention counted causally)"
)


def peak_flops(dtype: Any) -> tuple[float, str]:
    """FLOP/s of one device, and where the number comes from.

    A device without a data sheet here (a CPU) is measured: the fastest of five products of 2048 x 2048 matrices.
    """
    if chip := chips.of_device(jax.devices()[0].device_kind):
        return chip.bf16_flops / chip.devices, f"{chip.name} data sheet, dense bfloat16"
    size, seconds = 2048, []
    with jax.set_mesh(jax.make_mesh((1,), ("one",), devices=jax.local_devices()[:1])):
        x = jnp.ones((size, size), dtype)
        product = jax.jit(jnp.dot)
        jax.block_until_ready(product(x, x))
        for _ in range(5):
            started = time.perf_counter()
            jax.block_until_ready(product(x, x))
            seconds.append(time.perf_counter() - started)
    # Simulated devices share the cores that this product had for itself
    return 2 * size**3 / min(seconds) / jax.local_device_count(), f"measured {size}x{size} {jnp.dtype(dtype)} product"


def flop_imbalance(costs: np.ndarray) -> float:
    """How much longer than need be the devices take: (max - mean) / mean over ranks, averaged over pieces.

    Args:
      costs: [pieces of a step, ranks].
    """
    mean = costs.mean(-1)
    return float(((costs.max(-1) - mean) / mean).mean())


class MetricsLog:
    """Appends rows of numbers to `metrics.jsonl` and to TensorBoard files beside it.

    Rows are only ever added: a restarted run logs the steps since its checkpoint again, and the last row of a step
    is the one that counts.

    Args:
      writes: to disk; of several processes one does.
    """

    def __init__(self, folder: Path, writes: bool = True):
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / "metrics.jsonl" if writes else Path(os.devnull)
        last = path.read_bytes()[-1:] if path.is_file() else b""
        self._lines = path.open("a", encoding="utf-8")
        if last not in (b"", b"\n"):  # the last line of a killed run; it must not swallow the next one
            self._lines.write("\n")
        self._board = tensorboardX.SummaryWriter(str(folder / "tensorboard"), write_to_disk=writes)

    def write(self, step: int, **values: float) -> None:
        """Logs the values of one step."""
        self._lines.write(json.dumps({"step": step, "time": round(time.time(), 3), **values}) + "\n")
        self._lines.flush()
        for name, value in values.items():
            self._board.add_scalar(name, value, step)

    def close(self) -> None:
        """Flushes both files."""
        self._lines.close()
        self._board.close()


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
            speed = {"step_s": seconds, "tokens_per_s": rate, "mfu": mfu}
            self._log.write(number, **numbers, **facts, learning_rate=rate_of_learning, **speed)
        self._show(number, f"loss {numbers['loss']:.4f}  {rate:,.0f} tok/s  {seconds:.2f} s/step  MFU {mfu:.1%}")


def read(folder: Path) -> list[dict[str, Any]]:
    """The rows of a run by step, a restarted run's repetitions removed."""
    path = folder / "metrics.jsonl"
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.endswith("}")]
    merged: dict[int, dict[str, Any]] = {}
    for row in rows:
        merged.setdefault(row["step"], {}).update(row)
    return [merged[step] for step in sorted(merged)]
