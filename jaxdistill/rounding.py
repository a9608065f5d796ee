"""Stochastic rounding to bfloat16: what a nearest rounding would lose each time is kept on average."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, BFloat16, Float, PRNGKeyArray, UInt32


def stochastic(x: Float[Array, "*dims C"], key: PRNGKeyArray) -> BFloat16[Array, "*dims C"]:
    """One of the two bfloat16 neighbours of each float32, the nearer one the more often: the mean is the value itself.

    bfloat16 has 8 bits of precision, so that a nearest rounding drops every change below 1/512 of what it is added to:
    the updates of small learning rates, and the decay of a slow moving average. Values that bfloat16 holds are kept
    as they are, infinities and NaN too. The same key gives the same result on every mesh.
    """
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32) + (_bits(x, key) >> 16)
    rounded = jax.lax.bitcast_convert_type((bits >> 16).astype(jnp.uint16), jnp.bfloat16)
    return jnp.where(jnp.isfinite(x), rounded, x.astype(jnp.bfloat16))


def _bits(x: Array, key: PRNGKeyArray) -> UInt32[Array, "*dims C"]:
    """Random bits for each element: a hash of its place in the whole array and of the key, whatever the mesh.

    `jax.random.bits` would give better ones, but the optimizer of a large model then compiles half as long again.
    """
    first, *_, second = jax.random.key_data(key)
    layout = jax.typeof(x).sharding.spec if not jax.sharding.get_abstract_mesh().empty else None

    def index(dim: int) -> Array:
        return jax.lax.broadcasted_iota(jnp.uint32, x.shape, dim, out_sharding=layout)

    *outer, last = range(x.ndim)
    row = jnp.uint32(0)  # of all dimensions but the last: fewer than 2**32 in any weight
    for dim in outer:
        row = row * x.shape[dim] + index(dim)
    return _mix(_mix(row ^ first) ^ second ^ index(last))


def _mix(h: Array) -> Array:
    """Chris Wellons' "lowbias32" hash of 32 bits (github.com/skeeto/hash-prospector)."""
    h = (h ^ (h >> 16)) * jnp.uint32(0x7FEB352D)
    h = (h ^ (h >> 15)) * jnp.uint32(0x846CA68B)
    return h ^ (h >> 16)
