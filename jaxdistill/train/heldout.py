"""The loss on examples that are held out."""

import math
from pathlib import Path

from rich.console import Console

from jaxdistill import sharding
from jaxdistill.data import loader
from jaxdistill.errors import UserError
from jaxdistill.metrics import MetricsLog
from jaxdistill.models import decoder
from jaxdistill.models.attention import Attention
from jaxdistill.models.config import Config
from jaxdistill.progress import Progress
from jaxdistill.train.config import TrainConfig
from jaxdistill.train.step import make_heldout_loss, place


class Heldout:
    """Held-out rows, and the compiled loss that is measured on them."""

    def __init__(self, config: TrainConfig, rows: loader.PackedSet, attention: Attention, c: Config, console: Console):
        self.rows = rows
        self._path: Path | None = config.heldout
        self._batch_rows = config.batch_rows // config.step.accumulate
        self._own = sharding.own_rows(1, self._batch_rows)
        self._console = console
        self._loss = make_heldout_loss(config.step, attention, c)

    def measure(self, step: int, params: decoder.Params, log: MetricsLog) -> float:
        """Token-mean loss, in nats; logged and told as of this step."""
        total, weight = 0.0, 0.0
        with Progress(*Progress.get_default_columns(), console=self._console, transient=True) as bar:
            task = bar.add_task("held-out", total=math.ceil(len(self.rows) / self._batch_rows))
            for dealt in loader.batches(self.rows, self._batch_rows, epochs=1, seed=0, own=self._own):
                loss, tokens = self._loss(params, place(dealt.batch))
                total, weight = total + float(loss), weight + float(tokens)
                bar.update(task, advance=1)
        if not weight:
            raise UserError(f"{self._path}: every example that fits a row has weight 0; expected some above")
        log.write(step, heldout_loss=total / weight)
        self._console.print(f"held-out loss at step {step}: {total / weight:.4f} nats/token")
        return total / weight
