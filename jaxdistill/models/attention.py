"""Attention over packed rows (training) and over a cache (sampling)."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from jaxdistill.sharding import relayout, spec

OUTPUT_NAME = "attention_output"  # remat policies save it by this name
Attend = Callable[[Array, Array, Array], tuple[Array, Any]]  # q, k, v -> output and what is kept

_QUERY_CHUNKS = 16  # a row's queries in this many pieces: 1/16 of S x S scores live at once
_MIN_QUERY_CHUNK = 128
_MASKED = -1e30  # finite, so that a row without any key gives a mean of values and not NaN


def packed_attention(
    q: Float[Array, "B T N H"], k: Float[Array, "B T K H"], v: Float[Array, "B T K H"], segments: Int[Array, "B T"]
) -> Float[Array, "B T N H"]:
    """Causal attention within the documents of packed rows; softmax in float32.

    Keys and values are gathered over the context axis; queries stay where they are.
    """
    keys, values, key_segments = relayout(k, "BSKH"), relayout(v, "BSKH"), relayout(segments, "BS")
    out = jax.shard_map(
        _packed_attention_local,
        in_specs=(spec("BTNH"), spec("BSKH"), spec("BSKH"), spec("BT"), spec("BS")),
        out_specs=spec("BTNH"),
    )(q, keys, values, segments, key_segments)
    return checkpoint_name(out, OUTPUT_NAME)


def _packed_attention_local(q: Array, k: Array, v: Array, segments: Array, key_segments: Array) -> Array:
    """One device's share: its queries T, all keys S, in chunks of queries so that T x S never exists."""
    T, S = q.shape[1], k.shape[1]
    start = jax.lax.axis_index("context") * T if T < S else 0
    chunk = min(T, max(_MIN_QUERY_CHUNK, -(-T // _QUERY_CHUNKS)))
    outputs = []
    for at in range(0, T, chunk):
        end = min(at + chunk, T)
        # A row that is not split by context knows its place while tracing: later keys are not even read.
        seen = end if T == S else S
        rows = start + jnp.arange(at, end)
        mask = (segments[:, at:end, None] == key_segments[:, None, :seen]) & (rows[:, None] >= jnp.arange(seen))
        outputs.append(jax.checkpoint(_attend_masked)(q[:, at:end], k[:, :seen], v[:, :seen], mask))
    return jnp.concatenate(outputs, axis=1)


def _attend_masked(q: Array, k: Array, v: Array, mask: Array) -> Array:
    """Grouped-query attention of [B, T, N, H] to [B, S, K, H] where `mask` [B, T, S] allows."""
    B, T, N, H = q.shape
    K = k.shape[2]
    q_BTKGH = q.reshape(B, T, K, N // K, H)
    scores_BKGTS = jnp.einsum("BTKGH,BSKH->BKGTS", q_BTKGH, k, preferred_element_type=jnp.float32) * H**-0.5
    scores_BKGTS = jnp.where(mask[:, None, None], scores_BKGTS, _MASKED)
    probabilities = jax.nn.softmax(scores_BKGTS, axis=-1).astype(v.dtype)
    return jnp.einsum("BKGTS,BSKH->BTKGH", probabilities, v).reshape(B, T, N, H)
