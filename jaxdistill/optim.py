"""Optimizer and schedule from optax, by one config."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import optax

from jaxdistill import weights
from jaxdistill.errors import UserError


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """AdamW with linear warm-up and cosine decay."""

    peak_lr: float = 1e-5  # learning rate after warm-up
    end_lr_fraction: float = 0.1  # of peak_lr, at the last step
    warmup_fraction: float = 0.03  # of the phase's steps
    b1: float = 0.9  # decay of the first moment
    b2: float = 0.95  # decay of the second moment
    eps: float = 1e-8
    weight_decay: float = 0.0  # on matrices; norm scales and biases are left alone
    clip_norm: float = 1.0  # largest global gradient norm

    def __post_init__(self):
        if not 0 < self.peak_lr < 1:
            raise UserError(f"optim.peak_lr is {self.peak_lr}; expected a number between 0 and 1")
        if not 0 <= self.warmup_fraction <= 1:
            raise UserError(f"optim.warmup_fraction is {self.warmup_fraction}; expected 0 to 1")
        if self.clip_norm <= 0:
            raise UserError(f"optim.clip_norm is {self.clip_norm}; expected a positive number")


def schedule(c: OptimConfig, steps: int) -> Callable[[Any], Any]:
    """Learning rate by step, for a phase of `steps` optimizer steps."""
    warmup = min(round(c.warmup_fraction * steps), steps - 1)
    return optax.warmup_cosine_decay_schedule(
        init_value=c.peak_lr / max(warmup, 1),
        peak_value=c.peak_lr,
        warmup_steps=warmup,
        decay_steps=steps,
        end_value=c.peak_lr * c.end_lr_fraction,
    )


def make(c: OptimConfig, steps: int, template: Any) -> optax.GradientTransformation:
    """The optimizer. `template` holds the declared weights: those that start random are the ones that decay."""
    decays = jax.tree.map(lambda w: w.init.stddev > 0, template, is_leaf=weights.is_declared)
    return optax.chain(
        optax.clip_by_global_norm(c.clip_norm),
        optax.adamw(schedule(c, steps), b1=c.b1, b2=c.b2, eps=c.eps, weight_decay=c.weight_decay, mask=decays),
    )
