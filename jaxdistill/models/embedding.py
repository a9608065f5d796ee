"""The embedding lookup: every device answers from its own part of the table, so that no table travels."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxdistill.sharding import STORAGE, spec, split_over


def lookup(table: Float[Array, "V D"], tokens: Int[Array, "B T"], dtype: Any) -> Float[Array, "B T D"]:
    """Token embeddings, cast to `dtype`; the table stays in storage layout, V over tensor, D over fsdp and context.

    Devices that share tokens over fsdp and context tell each other their ids. Each looks all of them up in its
    slice, tokens outside its part of the vocabulary give 0 and the parts are added up; then slices of D are exchanged
    for the device's own tokens. Moved are [B, T, D] in `dtype`, where gathering the table would move [V, D].

    The gradient goes the same way back and ends in storage layout. A token's gradients are added up in float32:
    thousands of bfloat16 additions to one row lose most of what they add.
    """
    rows: Any = _lookup(table, tokens, dtype)
    return rows


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _lookup(table: Array, tokens: Array, dtype: Any) -> Array:
    local = functools.partial(_look_up, dtype=dtype)
    return jax.shard_map(local, in_specs=(_table(), spec("BT")), out_specs=spec("BTD"), check_vma=False)(table, tokens)


def _forward(table: Array, tokens: Array, dtype: Any) -> tuple[Array, tuple[Array, Array]]:
    return lookup(table, tokens, dtype), (table, tokens)  # the table is there anyway, so keeping it costs nothing


def _backward(dtype: Any, residuals: tuple[Array, Array], g: Array) -> tuple[Array, Any]:
    table, tokens = residuals
    d_table = jax.shard_map(_add_up, in_specs=(_table(), spec("BT"), spec("BTD")), out_specs=_table(), check_vma=False)
    return d_table(table, tokens, g), np.zeros(tokens.shape, jax.dtypes.float0)


_lookup.defvjp(_forward, _backward)


def _table() -> jax.P:
    return spec("VD", STORAGE)


def _shared() -> list[tuple[str, int]]:
    """Axes along which devices have different tokens and parts of D, and the dimension of tokens that each splits."""
    return [(axis, {"context": 1, "fsdp": 0}[axis]) for axis in reversed(split_over(spec("D", STORAGE)))]


def _local_rows(table: Array, tokens: Array) -> Array:
    """Which row of this device's part of the table each token of its group is; one past the end if in no row.

    A group is of the devices that share tokens, over fsdp and context.
    """
    V = table.shape[0]
    for axis, dim in _shared():
        tokens = jax.lax.all_gather(tokens, axis, axis=dim, tiled=True)
    rows = tokens - jax.lax.axis_index("tensor") * V
    return jnp.where((rows >= 0) & (rows < V), rows, V)


def _look_up(table: Array, tokens: Array, dtype: Any) -> Array:
    found = table.at[_local_rows(table, tokens)].get(mode="fill", fill_value=0).astype(dtype)
    found = jax.lax.psum(found, "tensor")  # exact: all but one of the addends are 0
    for axis, dim in _shared():
        found = jax.lax.all_to_all(found, axis, split_axis=dim, concat_axis=2, tiled=True)
    return found


def _add_up(table: Array, tokens: Array, g: Array) -> Array:
    """The gradient of this device's part of the table; of the table itself only shape and dtype are used."""
    for axis, dim in reversed(_shared()):
        g = jax.lax.all_to_all(g, axis, split_axis=2, concat_axis=dim, tiled=True)
    rows = _local_rows(table, tokens)
    sums = jnp.zeros(table.shape, jnp.float32).at[rows].add(g.astype(jnp.float32), mode="drop")
    return jax.lax.psum(sums, "data").astype(table.dtype)
