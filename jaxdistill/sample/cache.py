"""The key-value cache: pages of fixed size that lie anywhere, written in place; a table says which belong to whom."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float, Int

from jaxdistill.models.config import Config
from jaxdistill.sample.attention import ALL, Seeing, attend
from jaxdistill.sharding import spec

_KEY_DIMS, _VALUE_DIMS = "PKHS", "PKSH"


@struct.dataclass
class Cache:
    """Keys and values, an array a layer: P pages of S positions each, laid out as attention's two products read them.

    One array of all layers would be sliced, and so copied, at every layer of every step.
    """

    k: tuple[Float[Array, "P K H S"], ...]
    v: tuple[Float[Array, "P K S H"], ...]


def empty(c: Config, pages: int, page_tokens: int, dtype: Any) -> Cache:
    """A cache of zeros on the current mesh.

    Args:
      pages: on all devices together; split over data x fsdp.
    """
    sizes = {"P": pages, "K": c.kv_heads, "H": c.head_dim, "S": page_tokens}

    def zeros(dims: str) -> tuple[Array, ...]:
        make = jax.jit(lambda: jnp.zeros([sizes[d] for d in dims], dtype, out_sharding=spec(dims)))
        return tuple(make() for _ in range(c.layers))

    return Cache(k=zeros(_KEY_DIMS), v=zeros(_VALUE_DIMS))


def page_bytes(c: Config, page_tokens: int, dtype: Any) -> int:
    """Keys and values of all layers in one page."""
    return 2 * c.layers * c.kv_heads * c.head_dim * page_tokens * jnp.dtype(dtype).itemsize


def write_and_attend(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    keys: Float[Array, "P K H S"],
    values: Float[Array, "P K S H"],
    tables: Int[Array, "B M"],
    positions: Int[Array, "B T"],
    live: Bool[Array, "B T"],
    how: Seeing = ALL,
) -> tuple[Float[Array, "B T N H"], Array, Array]:
    """Stores new keys and values, then attends to everything each row holds up to the query's position.

    Args:
      keys: of one layer, as are the values.
      tables: pages of each row, by number among those of its own device.
      live: positions that exist; others are neither stored nor do they lengthen the loop over keys.
    """
    heads = spec("BTNH")
    stored = spec(_KEY_DIMS), spec(_VALUE_DIMS)
    return jax.shard_map(
        functools.partial(_local, how=how),
        in_specs=(heads, heads, heads, *stored, spec("B"), spec("BT"), spec("BT")),
        out_specs=(heads, *stored),
        check_vma=False,  # each device runs its loop over keys to its own end
    )(q, k, v, keys, values, tables, positions, live)


def _local(
    q: Array, k: Array, v: Array, keys: Array, values: Array, tables: Array, positions: Array, live: Array, how: Seeing
) -> tuple[Array, Array, Array]:
    P, _, S, _ = values.shape
    pages = jnp.take_along_axis(tables, jnp.minimum(positions // S, tables.shape[1] - 1), axis=1)
    pages = jnp.where(live, pages, P)  # out of range: dropped
    keys = keys.at[pages, :, :, positions % S].set(k.astype(keys.dtype), mode="drop")
    values = values.at[pages, :, positions % S].set(v.astype(values.dtype), mode="drop")
    return attend(q, keys, values, tables, positions, live, how), keys, values
