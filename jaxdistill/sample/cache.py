"""The key-value cache: preallocated, written in place, read in chunks up to the longest live position."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float, Int

from jaxdistill.models.config import Config
from jaxdistill.sharding import spec

_KEY_CHUNK = 256  # keys read at a time; the order of additions, so a result's last bits, depends on it alone
_MASKED = -1e30


@struct.dataclass
class Cache:
    """Keys and values of all layers: B slots of S positions each."""

    k: Float[Array, "L B S K H"]
    v: Float[Array, "L B S K H"]


def empty(c: Config, slots: int, positions: int, dtype: Any) -> Cache:
    """A cache of zeros on the current mesh; positions are rounded up to whole chunks."""
    shape = (c.layers, slots, -(-positions // _KEY_CHUNK) * _KEY_CHUNK, c.kv_heads, c.head_dim)
    make = jax.jit(lambda: jnp.zeros(shape, dtype, out_sharding=spec("LBSKH")))
    return Cache(k=make(), v=make())


def write_and_attend(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    cache: Cache,
    layer: Int[Array, ""],
    slots: Int[Array, " B"],
    positions: Int[Array, "B T"],
    live: Bool[Array, "B T"],
) -> tuple[Float[Array, "B T N H"], Cache]:
    """Stores new keys and values, then attends to everything each slot holds up to the query's position.

    Args:
      slots: slot of each row among those of its own device; consecutive, as rows are slots (decode) or one (prefill).
      live: positions that exist; others are neither stored nor do they lengthen the loop over keys.
    """
    rows, heads = jax.P(*spec("B")), spec("BTNH")
    out, keys, values = jax.shard_map(
        _local,
        in_specs=(heads, heads, heads, spec("LBSKH"), spec("LBSKH"), jax.P(), rows, spec("BT"), spec("BT")),
        out_specs=(heads, spec("LBSKH"), spec("LBSKH")),
        check_vma=False,  # each device runs its loop over keys to its own end
    )(q, k, v, cache.k, cache.v, layer, slots, positions, live)
    return out, Cache(k=keys, v=values)


def _local(
    q: Array, k: Array, v: Array, keys: Array, values: Array, layer: Array, slots: Array, positions: Array, live: Array
) -> tuple[Array, Array, Array]:
    B, T, N, H = q.shape
    S, K = keys.shape[2:4]
    at = jnp.where(live, positions, S)  # out of range: dropped
    keys = keys.at[layer, slots[:, None], at].set(k.astype(keys.dtype), mode="drop")
    values = values.at[layer, slots[:, None], at].set(v.astype(values.dtype), mode="drop")
    q_BTKGH = q.reshape(B, T, K, N // K, H)

    def read(cache: Array, i: Array) -> Array:
        start = (layer, slots[0], i * _KEY_CHUNK, 0, 0)
        return jax.lax.dynamic_slice(cache, start, (1, B, _KEY_CHUNK, K, H))[0].astype(q.dtype)

    def body(i: Array, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        # Online softmax. A chunk with no key to see changes nothing, to the last bit: so a row's result does not
        # depend on how far the loop runs for the sake of longer rows.
        top, total, sums = carry
        scores = jnp.einsum("BTKGH,BSKH->BKGTS", q_BTKGH, read(keys, i), preferred_element_type=jnp.float32) * H**-0.5
        visible = (i * _KEY_CHUNK + jnp.arange(_KEY_CHUNK)) <= positions[:, :, None]
        scores = jnp.where(visible[:, None, None], scores, _MASKED)
        new_top = jnp.maximum(top, scores.max(-1))
        weights = jnp.where(visible[:, None, None], jnp.exp(scores - new_top[..., None]), 0.0)
        shrink = jnp.exp(top - new_top)
        seen = jnp.einsum(
            "BKGTS,BSKH->BKGTH", weights.astype(q.dtype), read(values, i), preferred_element_type=jnp.float32
        )
        return new_top, total * shrink + weights.sum(-1), sums * shrink[..., None] + seen

    shape = (B, K, N // K, T)
    start = (jnp.full(shape, _MASKED), jnp.zeros(shape), jnp.zeros((*shape, H)))
    chunks = jnp.max(jnp.where(live, positions, 0)) // _KEY_CHUNK + 1
    _, total, sums = jax.lax.fori_loop(0, chunks, body, start)
    out = (sums / jnp.maximum(total, 1e-30)[..., None]).astype(q.dtype)
    return jnp.moveaxis(out, 3, 1).reshape(B, T, N, H), keys, values
