"""Attention over packed rows: one entry, context parallelism around it, and a file per backend."""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal

from jaxtyping import Array

Attend = Callable[[Array, Array, Array], tuple[Array, Any]]  # q, k, v -> output and what is kept

OUTPUT_NAME = "attention_output"  # remat policies save it, and what the backward pass needs beside it, by this name

Backend = Literal["splash", "cudnn", "mosaic", "blockwise"]
ContextParallelism = Literal["all_gather", "ulysses"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Attention:
    """How attention is computed; all ways give the same numbers, up to rounding."""

    backend: Backend = "blockwise"  # which runs on every platform; backends.choose knows the one that is fast
    context: ContextParallelism = "all_gather"  # what moves where rows are split over mesh.context
    segments: int = 64  # documents of a row at most, its padding counted as one; memory of cudnn grows with it


REFERENCE = Attention()


@dataclasses.dataclass(frozen=True)
class Scores:
    """How a model makes scores of queries and keys."""

    scale: float | None = None  # of the products; head_dim ** -0.5 by default
    cap: float | None = None  # no score is larger: cap * tanh(score / cap)

    def scale_of(self, head_dim: int) -> float:
        """What the products of vectors of this size are multiplied by."""
        return head_dim**-0.5 if self.scale is None else self.scale


PLAIN = Scores()
