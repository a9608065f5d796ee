"""Optimizers and schedules from optax, by one config."""

import dataclasses
import fnmatch
import re
from collections.abc import Callable
from typing import Any, Literal

import jax
import optax
from optax.contrib import MuonDimensionNumbers, scale_by_muon

from jaxdistill import weights
from jaxdistill.errors import UserError
from jaxdistill.weights import Declared

_MUON_RMS = 0.2  # of Muon's updates, about that of Adam's: so one learning rate does for both (arXiv 2502.16982)


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """Optimizer, learning rate by step, weight decay, clipping and averaging."""

    optimizer: Literal["adamw", "muon", "lion", "adafactor"] = "adamw"  # muon: the matrices of layers; adamw the others
    peak_lr: float = 1e-5  # learning rate after warm-up
    schedule: Literal["cosine", "wsd", "constant"] = "cosine"  # wsd: constant, then linear decay
    end_lr_fraction: float = 0.1  # of peak_lr, at the last step
    warmup_fraction: float = 0.03  # of the phase's steps
    decay_fraction: float = 0.2  # of the phase's steps, at its end: wsd's decay
    b1: float = 0.9  # decay of the first moment; of lion's, and of muon's momentum
    b2: float = 0.95  # decay of the second moment; of lion's momentum
    eps: float = 1e-8
    weight_decay: float = 0.0  # on matrices; norm scales and biases are left alone
    no_decay: tuple[str, ...] = ()  # Hugging Face names left alone too, with wildcards: "model.embed_tokens.*"
    clip_norm: float = 1.0  # largest global gradient norm
    state_dtype: Literal["float32", "bfloat16"] = "float32"  # of weights and moments; bfloat16: rounded stochastically
    average_decay: float = 0.0  # of a moving average of the weights, which the phase then hands on (EMA); 0 is none

    def __post_init__(self):
        if not 0 < self.peak_lr < 1:
            raise UserError(f"optim.peak_lr is {self.peak_lr}; expected a number between 0 and 1")
        for name in ("end_lr_fraction", "warmup_fraction", "decay_fraction"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"optim.{name} is {getattr(self, name)}; expected 0 to 1")
        if self.schedule == "wsd" and self.warmup_fraction + self.decay_fraction > 1:
            raise UserError(
                f"optim.warmup_fraction {self.warmup_fraction} and optim.decay_fraction {self.decay_fraction} overlap; "
                "expected a sum of at most 1"
            )
        for name in ("b1", "b2", "average_decay"):
            if not 0 <= getattr(self, name) < 1:
                raise UserError(f"optim.{name} is {getattr(self, name)}; expected 0 to less than 1")
        for name in ("eps", "clip_norm"):
            if getattr(self, name) <= 0:
                raise UserError(f"optim.{name} is {getattr(self, name)}; expected a positive number")
        if self.weight_decay < 0:
            raise UserError(f"optim.weight_decay is {self.weight_decay}; expected 0 (none) or more")


def schedule(c: OptimConfig, steps: int) -> Callable[[Any], Any]:
    """Learning rate by step, for a phase of `steps` optimizer steps."""
    warmup = min(round(c.warmup_fraction * steps), steps - 1)
    start, end = c.peak_lr / max(warmup, 1), c.peak_lr * c.end_lr_fraction
    if c.schedule == "cosine":
        return optax.warmup_cosine_decay_schedule(start, c.peak_lr, warmup, steps, end)
    decay = min(round(c.decay_fraction * steps), steps - warmup) if c.schedule == "wsd" else 0
    pieces, borders = [optax.linear_schedule(start, c.peak_lr, warmup), optax.constant_schedule(c.peak_lr)], [warmup]
    if decay:
        pieces.append(optax.linear_schedule(c.peak_lr, end, decay))
        borders.append(steps - decay)
    return optax.join_schedules(pieces, borders)


def make(c: OptimConfig, steps: int, template: Any) -> optax.GradientTransformation:
    """The optimizer.

    Args:
      template: the declared weights: those that start random are the ones that decay.

    Raises:
      UserError: a pattern of `no_decay` is the name of no weight.
    """
    return optax.chain(
        optax.clip_by_global_norm(c.clip_norm),
        _direction(c, template),
        optax.add_decayed_weights(c.weight_decay, _decays(c, template)),
        optax.scale_by_learning_rate(schedule(c, steps)),
    )


def _direction(c: OptimConfig, template: Any) -> optax.GradientTransformation:
    """From gradients to updates of about unit size, which the learning rate scales."""
    adam = optax.scale_by_adam(c.b1, c.b2, c.eps)
    if c.optimizer == "lion":
        return optax.scale_by_lion(c.b1, c.b2)
    if c.optimizer == "adafactor":  # as T5 used it, but for the learning rate, which is AdamW's and not relative
        return optax.chain(optax.scale_by_factored_rms(), optax.clip_by_block_rms(1.0))
    if c.optimizer == "muon":
        dimensions = jax.tree.map(_muon_dimensions, template, is_leaf=weights.is_declared)
        scales = jax.tree.map(_muon_scale, template, is_leaf=weights.is_declared)
        matrices = optax.chain(
            _laid_out_by_compiler(scale_by_muon(beta=c.b1, eps=c.eps, weight_dimension_numbers=dimensions)),
            optax.stateless(lambda updates, _: jax.tree.map(lambda u, by: u * by, updates, scales)),
        )
        labels = jax.tree.map(lambda w: "muon" if _is_matrix(w) else "adam", template, is_leaf=weights.is_declared)
        return optax.partition({"muon": matrices, "adam": adam}, labels)
    return adam


def _decays(c: OptimConfig, template: Any) -> Any:
    names = [w.hf_name for w in jax.tree.leaves(template, is_leaf=weights.is_declared)]
    if unknown := [pattern for pattern in c.no_decay if not fnmatch.filter(names, pattern)]:
        raise UserError(f"optim.no_decay: {', '.join(unknown)} names no weight; the weights are {', '.join(names)}")

    def decays(w: Declared) -> bool:
        return w.init.stddev > 0 and not any(fnmatch.fnmatch(w.hf_name, pattern) for pattern in c.no_decay)

    return jax.tree.map(decays, template, is_leaf=weights.is_declared)


def _is_matrix(w: Declared) -> bool:
    """Whether a weight is a stack of the layers' matrices; Muon leaves embedding and head to Adam."""
    return w.dims.startswith("L") and w.init.stddev > 0


def _muon_dimensions(w: Declared) -> MuonDimensionNumbers | optax.MaskedNode:
    """What a matrix contracts and what it puts out, as its Hugging Face layout says: output before input."""
    if not _is_matrix(w):
        return optax.MaskedNode()
    output, reduction = (re.findall(r"\w", group) for group in re.findall(r"\([^)]*\)|\w", w.hf_dims))
    return MuonDimensionNumbers([w.dims.index(d) for d in reduction], [w.dims.index(d) for d in output])


def _muon_scale(w: Declared) -> float | optax.MaskedNode:
    """Brings an orthogonal matrix, whose entries are the smaller the larger it is, to the same size as any other."""
    return _MUON_RMS * max(w.hf_shape) ** 0.5 if _is_matrix(w) else optax.MaskedNode()


def _laid_out_by_compiler(inner: optax.GradientTransformation) -> optax.GradientTransformation:
    """Runs an update whose matrix products contract sharded dimensions, which explicit layouts refuse."""

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        if jax.sharding.get_abstract_mesh().empty:
            return inner.update(updates, state, params)
        layouts = jax.tree.map(lambda x: jax.typeof(x).sharding, (updates, state))
        laid_out: Any = jax.sharding.auto_axes(inner.update, out_sharding=layouts)
        return laid_out(updates, state)

    return optax.GradientTransformation(inner.init, update)
