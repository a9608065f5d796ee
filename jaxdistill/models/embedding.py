"""The embedding lookup: every device answers from its own part of the table, so that no table travels."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxdistill.sharding import STORAGE, spec, split_over

_TABLE = spec("VD", STORAGE)
_SHARED = ("context", 1), ("fsdp", 0)  # axes along which devices split a table's D and different tokens


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
    rows_are_split = "context" in split_over(spec("BT"))
    local = functools.partial(_look_up if rows_are_split else _look_up_whole_rows, dtype=dtype)
    return jax.shard_map(local, in_specs=(_TABLE, spec("BT")), out_specs=spec("BTD"), check_vma=False)(table, tokens)


def _forward(table: Array, tokens: Array, dtype: Any) -> tuple[Array, tuple[Array, Array]]:
    return lookup(table, tokens, dtype), (table, tokens)  # the table is there anyway, so keeping it costs nothing


def _backward(dtype: Any, residuals: tuple[Array, Array], g: Array) -> tuple[Array, Any]:
    table, tokens = residuals
    d_table = jax.shard_map(_add_up, in_specs=(_TABLE, spec("BT"), spec("BTD")), out_specs=_TABLE, check_vma=False)
    return d_table(table, tokens, g), np.zeros(tokens.shape, jax.dtypes.float0)


_lookup.defvjp(_forward, _backward)


def _local_rows(table: Array, tokens: Array, *axes: tuple[str, int]) -> Array:
    """Which row of this device's part of the table each token of its group is; one past the end if in no row.

    Args:
      axes: of the mesh, along which devices share tokens, and the dimension of tokens that each splits.
    """
    V = table.shape[0]
    for axis, dim in axes:
        tokens = jax.lax.all_gather(tokens, axis, axis=dim, tiled=True)
    rows = tokens - jax.lax.axis_index("tensor") * V
    return jnp.where((rows >= 0) & (rows < V), rows, V)


def _found(table: Array, rows: Array, dtype: Any) -> Array:
    found = table.at[rows].get(mode="fill", fill_value=0).astype(dtype)
    return jax.lax.psum(found, "tensor")  # exact: all but one of the addends are 0


def _look_up(table: Array, tokens: Array, dtype: Any) -> Array:
    found = _found(table, _local_rows(table, tokens, *_SHARED), dtype)
    found = jax.lax.all_to_all(found, "context", split_axis=1, concat_axis=2, tiled=True)
    return jax.lax.all_to_all(found, "fsdp", split_axis=0, concat_axis=2, tiled=True)


def _look_up_whole_rows(table: Array, tokens: Array, dtype: Any) -> Array:
    found = _found(table, _local_rows(table, tokens, ("fsdp", 0)), dtype)
    found = jax.lax.all_gather(found, "context", axis=2, tiled=True)
    return jax.lax.all_to_all(found, "fsdp", split_axis=0, concat_axis=2, tiled=True)


def _add_up(table: Array, tokens: Array, g: Array) -> Array:
    """The gradient of this device's part of the table; of the table itself only shape and dtype are used."""
    g = jax.lax.all_to_all(g, "fsdp", split_axis=2, concat_axis=0, tiled=True)
    g = jax.lax.all_to_all(g, "context", split_axis=2, concat_axis=1, tiled=True)
    rows = _local_rows(table, tokens, *_SHARED)
    sums = jnp.zeros(table.shape, jnp.float32).at[rows].add(g.astype(jnp.float32), mode="drop")
    return jax.lax.psum(sums, "data").astype(table.dtype)
