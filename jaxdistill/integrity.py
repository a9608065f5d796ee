"""A sum over the bits of every array of a checkpoint, made on the devices: what was read back is what was saved.

Storage checks its own tables and not the numbers in them, and a sum made on the devices also covers the way there and
back, on any mesh and any file system.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, UInt32

_BLOCK = 2**22  # elements that are summed at once on the host
_WORDS = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}  # by bytes of an element


def sums(tree: Any) -> dict[str, dict[str, Any]]:
    """The dtype and the sum of each array of a tree, by its path; the same for every layout on every mesh."""
    found = {_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}
    # Each is read before the next is started: simulated devices wait for one another for ever in two programs at once
    return {name: {"dtype": str(leaf.dtype), "sum": int(_sum(leaf))} for name, leaf in found.items()}


def changed(tree: Any, saved: dict[str, dict[str, Any]]) -> list[str]:
    """Paths of the arrays whose bits are not those that `sums` saw; one read in another dtype cannot be compared."""
    return [
        name
        for name, found in sums(tree).items()
        if name in saved and found["dtype"] == saved[name]["dtype"] and found["sum"] != saved[name]["sum"]
    ]


def sum_on_host(shape: tuple[int, ...], read: Callable[[Any], np.ndarray]) -> int:
    """The sum of an array that is read a layer at a time.

    Args:
      read: gives the array at an index of its first dimension; of an array of fewer than three, all of it at `...`.
    """
    total, place = 0, 0
    for i in range(shape[0]) if len(shape) > 2 else (...,):
        part = read(i).reshape(-1)
        for start in range(0, part.size, _BLOCK):
            block = part[start : start + _BLOCK]
            words = block.view(f"u{block.itemsize}").astype(np.uint32)
            index = np.arange(place, place + words.size, dtype=np.uint64).astype(np.uint32)
            total += int(np.sum(words * (2 * index + 1), dtype=np.uint32))
            place += words.size
    return total % 2**32


def _name(path: tuple[Any, ...]) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")


@jax.jit
def _sum(x: Array) -> UInt32[Array, ""]:
    """Each word times an odd number of its own, modulo 2**32: one that changes shows, as do two that trade places."""
    if jax.typeof(x).memory_space == jax.memory.Space.Host:
        x = jax.device_put(x, jax.memory.Space.Device)
    if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        x = jax.random.key_data(x)
    words = jax.lax.bitcast_convert_type(x, _WORDS[x.dtype.itemsize]).astype(jnp.uint32)
    index, stride = jnp.zeros((), jnp.uint32), 1
    for axis in reversed(range(x.ndim)):
        here = jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis, out_sharding=jax.typeof(x).sharding)
        index, stride = index + here * np.uint32(stride % 2**32), stride * x.shape[axis]
    return jnp.sum(words * (2 * index + 1), dtype=jnp.uint32)
