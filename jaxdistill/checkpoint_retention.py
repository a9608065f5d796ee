"""How many checkpoints of a phase are made, where, and how many are kept."""

import dataclasses
from pathlib import Path
from typing import Any

from orbax.checkpoint.checkpoint_managers import preservation_policy as policies

from jaxdistill.errors import UserError

LIMIT_S = 1200.0  # that writing one may take: Orbax's own limit


def heldout_loss(metrics: Any) -> float:
    """Of a checkpoint, by what was measured of it."""
    return metrics["heldout_loss"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Retention:
    """Which checkpoints of a phase stay on disk; one that any of these names does."""

    keep: int = 2  # the newest
    keep_every: int | None = None  # every so many steps
    keep_best: int = 0  # those of the lowest held-out loss, which is then measured at every checkpoint

    def __post_init__(self):
        if self.keep < 1 or self.keep_best < 0 or (self.keep_every is not None and self.keep_every < 1):
            raise UserError(f"{self}: expected keep and keep_every of 1 or more, keep_best of 0 or more")

    def policy(self) -> Any:
        """As Orbax takes it."""
        kept: list[Any] = [policies.LatestN(self.keep)]
        if self.keep_every:
            kept.append(policies.EveryNSteps(self.keep_every))
        if self.keep_best:
            kept.append(
                policies.BestN(
                    get_metric_fn=heldout_loss, reverse=True, n=self.keep_best, keep_checkpoints_without_metrics=False
                )
            )
        return policies.AnyPreservationPolicy(kept)


RETENTION = Retention()


@dataclasses.dataclass(frozen=True, kw_only=True)
class FastTier:
    """Checkpoints of each process's own shards on its host, between those of the run folder."""

    folder: Path | None = None  # on every host, a disk or memory that outlives the process; None is no such tier
    every: int = 10  # steps between two

    def __post_init__(self):
        if self.every < 1:
            raise UserError(f"fast.every is {self.every}; expected 1 or more")


FAST_TIER = FastTier()
