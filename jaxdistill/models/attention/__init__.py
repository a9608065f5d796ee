"""Attention over packed rows: one entry, context parallelism around it, and a file per backend."""

from collections.abc import Callable
from typing import Any

from jaxtyping import Array

Attend = Callable[[Array, Array, Array], tuple[Array, Any]]  # q, k, v -> output and what is kept

OUTPUT_NAME = "attention_output"  # remat policies save it, and what the backward pass needs beside it, by this name
