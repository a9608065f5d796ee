"""The key-value cache: preallocated, written in place, read in chunks up to the longest live position."""

from typing import Any

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import struct
from jaxtyping import Array, Bool, Float, Int

from jaxdistill.models.config import Config
from jaxdistill.sharding import spec

_KEY_CHUNK = 256  # keys read at a time; the order of additions, so a result's last bits, depends on it alone
_GROUP_BYTES = 2**21  # keys of one chunk that a CPU's second-level caches hold
_MASKED = -1e30
_KEY_DIMS, _VALUE_DIMS = "LBKHS", "LBKSH"


@struct.dataclass
class Cache:
    """Keys and values of all layers: B slots of S positions each, laid out as attention's two products read them."""

    k: Float[Array, "L B K H S"]
    v: Float[Array, "L B K S H"]


def empty(c: Config, slots: int, positions: int, dtype: Any) -> Cache:
    """A cache of zeros on the current mesh; positions are rounded up to whole chunks."""
    sizes = {"L": c.layers, "B": slots, "K": c.kv_heads, "H": c.head_dim, "S": -(-positions // _KEY_CHUNK) * _KEY_CHUNK}

    def zeros(dims: str) -> Array:
        return jax.jit(lambda: jnp.zeros([sizes[d] for d in dims], dtype, out_sharding=spec(dims)))()

    return Cache(k=zeros(_KEY_DIMS), v=zeros(_VALUE_DIMS))


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
    stored = spec(_KEY_DIMS), spec(_VALUE_DIMS)
    out, keys, values = jax.shard_map(
        _local,
        in_specs=(heads, heads, heads, *stored, jax.P(), rows, spec("BT"), spec("BT")),
        out_specs=(heads, *stored),
        check_vma=False,  # each device runs its loop over keys to its own end
    )(q, k, v, cache.k, cache.v, layer, slots, positions, live)
    return out, Cache(k=keys, v=values)


def _local(
    q: Array, k: Array, v: Array, keys: Array, values: Array, layer: Array, slots: Array, positions: Array, live: Array
) -> tuple[Array, Array, Array]:
    (B, T), (K, S, H) = q.shape[:2], values.shape[2:]
    at = jnp.where(live, positions, S)  # out of range: dropped
    rows = slots[:, None]
    keys = keys.at[layer, rows, :, :, at].set(k.astype(keys.dtype), mode="drop")
    values = values.at[layer, rows, :, at].set(v.astype(values.dtype), mode="drop")
    q_BKXH = rearrange(q, "B T (K G) H -> B K (G T) H", K=K)
    size = _group_size(B, K * H * _KEY_CHUNK * keys.dtype.itemsize)
    if size == B:
        out = _attend(q_BKXH, keys, values, layer, slots[0], positions, live)
    else:

        def group(first: Array) -> Array:
            own = [jax.lax.dynamic_slice_in_dim(a, first, size) for a in (q_BKXH, positions, live)]
            return _attend(own[0], keys, values, layer, slots[0] + first, own[1], own[2])

        out = jax.lax.map(group, jnp.arange(0, B, size)).reshape(q_BKXH.shape)
    return rearrange(out, "B K (G T) H -> B T (K G) H", T=T), keys, values


def _group_size(slots: int, chunk_bytes: int) -> int:
    """Slots to attend at a time: all on an accelerator; on a CPU as many as its caches hold a chunk of the keys of."""
    if jax.default_backend() != "cpu":
        return slots
    return max((n for n in range(1, slots + 1) if slots % n == 0 and n * chunk_bytes <= _GROUP_BYTES), default=1)


def _attend(
    q_BKXH: Array, keys: Array, values: Array, layer: Array, slot: Array, positions: Array, live: Array
) -> Array:
    """Attention [B, K, X, H] of B consecutive slots from `slot` on, up to the longest of them."""
    (B, K, X, H), dtype = q_BKXH.shape, q_BKXH.dtype
    # The last key that each of X = G T queries sees
    last_X = jnp.tile(positions, (1, X // positions.shape[1]))[:, None, :, None]

    def body(i: Array, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        # Online softmax. A chunk with no key to see changes nothing, to the last bit: so a row's result does not
        # depend on how far the loop runs for the sake of longer rows.
        top, total, sums = carry
        first = i * _KEY_CHUNK
        k_BKHs = jax.lax.dynamic_slice(keys, (layer, slot, 0, 0, first), (1, B, K, H, _KEY_CHUNK))[0]
        v_BKsH = jax.lax.dynamic_slice(values, (layer, slot, 0, first, 0), (1, B, K, _KEY_CHUNK, H))[0]
        scores = jnp.einsum("BKXH,BKHs->BKXs", q_BKXH, k_BKHs.astype(dtype), preferred_element_type=jnp.float32)
        visible = first + jnp.arange(_KEY_CHUNK) <= last_X
        scores = jnp.where(visible, scores * H**-0.5, _MASKED)
        new_top = jnp.maximum(top, scores.max(-1))
        weights = jnp.where(visible, jnp.exp(scores - new_top[..., None]), 0.0)
        shrink = jnp.exp(top - new_top)
        seen = jnp.einsum(
            "BKXs,BKsH->BKXH", weights.astype(dtype), v_BKsH.astype(dtype), preferred_element_type=jnp.float32
        )
        return new_top, total * shrink + weights.sum(-1), sums * shrink[..., None] + seen

    zeros = jnp.zeros(q_BKXH.shape, jnp.float32)
    start = (zeros[..., 0] + _MASKED, zeros[..., 0], zeros)
    chunks = jnp.max(jnp.where(live, positions, 0)) // _KEY_CHUNK + 1
    _, total, sums = jax.lax.fori_loop(0, chunks, body, start)
    return (sums / jnp.maximum(total, 1e-30)[..., None]).astype(dtype)
