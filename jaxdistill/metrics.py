"""What a run reports about itself: JSON Lines and TensorBoard, and model FLOPs utilization with its formula."""

import json
import os
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxdistill import chips, tracking

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
    """Appends rows of numbers to `metrics.jsonl`, and hands them to trackers.

    Rows are only ever added: a restarted run logs the steps since its checkpoint again, and the last row of a step
    is the one that counts.

    Args:
      writes: to disk and to the trackers; of several processes one does.
    """

    def __init__(self, folder: Path, writes: bool = True, track: tuple[tracking.Name, ...] = ("tensorboard",)):
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / "metrics.jsonl" if writes else Path(os.devnull)
        last = path.read_bytes()[-1:] if path.is_file() else b""
        self._lines = path.open("a", encoding="utf-8")
        if last not in (b"", b"\n"):  # the last line of a killed run; it must not swallow the next one
            self._lines.write("\n")
        self._trackers = tracking.opened(track, folder) if writes else []

    def write(self, step: int, **values: float) -> None:
        """Logs the values of one step."""
        self._lines.write(json.dumps({"step": step, "time": round(time.time(), 3), **values}) + "\n")
        self._lines.flush()
        for tracker in self._trackers:
            tracker.write(step, values)

    def close(self) -> None:
        """Flushes all of them."""
        self._lines.close()
        for tracker in self._trackers:
            tracker.close()


def read(folder: Path) -> list[dict[str, Any]]:
    """The rows of a run by step, a restarted run's repetitions removed."""
    path = folder / "metrics.jsonl"
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.endswith("}")]
    merged: dict[int, dict[str, Any]] = {}
    for row in rows:
        merged.setdefault(row["step"], {}).update(row)
    return [merged[step] for step in sorted(merged)]
