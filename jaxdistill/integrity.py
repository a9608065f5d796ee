"""A sum over the bits of every array of a checkpoint, made on the devices: what was read back is what was saved.

Storage checks its own tables and not the numbers in them, and a sum made on the devices also covers the way there and
back, on any mesh and any file system.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, UInt32

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
