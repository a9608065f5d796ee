"""The key-value cache: pages of fixed size that lie anywhere, written in place; a table says which belong to whom."""

import functools
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxdistill.models import quantized
from jaxdistill.models.config import Config
from jaxdistill.sample.attention import ALL, Pages, Seeing, attend, page_dims, page_sizes
from jaxdistill.sharding import spec

CacheDtype = Literal["compute", "float8", "int8"]

_SCALE = jnp.float32  # of a position's keys, or values, in 8 bits

Cache = tuple[Pages, ...]  # a layer each: one array of all layers would be sliced, and so copied, in every step


def _dims(in_8_bits: bool) -> Pages:
    """Letters of one layer's arrays; p, a page's positions, is split: each device along context has some of each."""
    keys, values = page_dims()
    scales = "PKp" if in_8_bits else None
    return Pages(keys=keys, values=values, key_scales=scales, value_scales=scales)


def empty(c: Config, pages: int, page_tokens: int, dtype: Any, cache_dtype: CacheDtype = "compute") -> Cache:
    """A cache of zeros on the current mesh.

    Args:
      pages: on all devices together; split over data x fsdp.
      page_tokens: split over context.
      dtype: of a cache in compute dtype.
    """
    sizes = {"P": pages, "K": c.kv_heads, "H": c.head_dim, "p": page_tokens}

    def zeros(dims: str) -> Array:
        stored = _SCALE if "H" not in dims else quantized.STORED.get(cache_dtype, dtype)
        return jax.jit(lambda: jnp.zeros([sizes[d] for d in dims], stored, out_sharding=spec(dims)))()

    return tuple(jax.tree.map(zeros, _dims(cache_dtype != "compute")) for _ in range(c.layers))


def page_bytes(c: Config, page_tokens: int, dtype: Any, cache_dtype: CacheDtype = "compute") -> int:
    """Keys and values of all layers in one page."""
    scale = 0 if cache_dtype == "compute" else jnp.dtype(_SCALE).itemsize
    of_head = c.head_dim * jnp.dtype(quantized.STORED.get(cache_dtype, dtype)).itemsize + scale
    return 2 * c.layers * c.kv_heads * page_tokens * of_head


def write_and_attend(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    pages: Pages,
    tables: Int[Array, "B M"],
    positions: Int[Array, "B T"],
    live: Bool[Array, "B T"],
    how: Seeing = ALL,
) -> tuple[Float[Array, "B T N H"], Pages]:
    """Stores new keys and values, then attends to everything each row holds up to the query's position.

    Args:
      pages: of one layer.
      tables: pages of each row, by number among those of its own device.
      live: positions that exist; others are neither stored nor do they lengthen the loop over keys.
    """
    heads = spec("BTNH")
    stored = jax.tree.map(spec, _dims(pages.key_scales is not None))
    return jax.shard_map(
        functools.partial(_local, how=how),
        in_specs=(heads, heads, heads, stored, spec("B"), spec("BT"), spec("BT")),
        out_specs=(heads, stored),
        check_vma=False,  # each device runs its loop over keys to its own end
    )(q, k, v, pages, tables, positions, live)


def _local(
    q: Array, k: Array, v: Array, pages: Pages, tables: Array, positions: Array, live: Array, how: Seeing
) -> tuple[Array, Pages]:
    (P, *_), (_, share) = pages.values.shape, page_sizes(pages)
    whole = share * jax.lax.axis_size("context")
    first = share * jax.lax.axis_index("context")  # this device's positions of each page
    held = jnp.take_along_axis(tables, jnp.minimum(positions // whole, tables.shape[1] - 1), axis=1)
    at = positions % whole - first
    here = live & (at >= 0) & (at < share)
    held = jnp.where(here, held, P)  # out of range: dropped
    if pages.key_scales is None:
        new = Pages(keys=k, values=v)
    else:
        of_k, of_v = (quantized.quantize(x, "BTKH", "BTK", pages.keys.dtype) for x in (k, v))
        new = Pages(keys=of_k[0], values=of_v[0], key_scales=of_k[1], value_scales=of_v[1])

    def write(dims: str, kept: Array, x: Array) -> Array:
        index = {"P": held, "p": at}
        return kept.at[tuple(index.get(letter, slice(None)) for letter in dims)].set(x.astype(kept.dtype), mode="drop")

    pages = jax.tree.map(write, _dims(pages.key_scales is not None), pages, new)
    return attend(q, pages, tables, positions, live, how), pages
