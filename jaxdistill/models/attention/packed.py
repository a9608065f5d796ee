"""Attention within the documents of packed rows, whose positions may be split over the context axis."""

from collections.abc import Mapping
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxdistill import sharding
from jaxdistill.errors import UserError
from jaxdistill.models.attention import blockwise
from jaxdistill.sharding import relayout, spec

ContextParallelism = Literal["all_gather", "ulysses"]


def packed_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    segments: Int[Array, "B T"],
    context: ContextParallelism = "all_gather",
) -> Float[Array, "B T N H"]:
    """Causal attention within the documents of packed rows; softmax in float32.

    Args:
      segments: the document of each position, and of padding; all arguments stand as `sharding.row_order` has them.
      context: what moves where rows are split. "all_gather": keys and values to every device, queries stay.
        "ulysses" (arXiv 2309.14509): positions are exchanged for heads, so each device sees whole rows of its heads;
        key/value heads are repeated where they are fewer than the devices.
    """
    key_segments = segments
    if jax.sharding.get_abstract_mesh().shape["context"] == 1:
        local = _one_device
    elif context == "all_gather":
        k, v, key_segments = relayout(k, "BSKH"), relayout(v, "BSKH"), relayout(segments, "BS")
        local = _gathered
    else:
        key_segments = relayout(segments, "BS")
        local = _exchanged
    layouts = [jax.typeof(x).sharding.spec for x in (q, k, v, key_segments)]
    return jax.shard_map(
        local,
        in_specs=tuple(layouts),
        out_specs=spec("BTNH"),
        check_vma=False,  # each device runs its loops over keys to its own end
    )(q, k, v, key_segments)


def check(heads: int, kv_heads: int, mesh: Mapping[str, int], context: ContextParallelism) -> None:
    """Refuses heads that a mesh of these sizes cannot exchange.

    Raises:
      UserError: Ulysses does not come out even.
    """
    shards, N, K = mesh["context"], heads // mesh["tensor"], kv_heads // mesh["tensor"]
    if context == "ulysses" and (N % shards or (K % shards and shards % K)):
        raise UserError(
            f"step.context ulysses deals {N} query and {K} key/value heads (of one share of mesh.tensor) to "
            f"mesh.context {shards} devices, which does not come out even; use all_gather or another mesh.context"
        )


def _one_device(q: Array, k: Array, v: Array, segments: Array) -> Array:
    return blockwise.attend(q, k, v, segments, jnp.arange(q.shape[1])[None])


def _gathered(q: Array, k: Array, v: Array, segments: Array) -> Array:
    """Two chunks of each row's queries [B, T, N, H] against all of its keys [B, S, K, H]."""
    T, S = q.shape[1], k.shape[1]
    order = sharding.row_order(S, S // T)
    rows = jnp.asarray(order.reshape(S // T, 2, -1))[jax.lax.axis_index("context")]
    k, v, segments = (x[:, np.argsort(order)] for x in (k, v, segments))
    return blockwise.attend(q, k, v, segments, rows)


def _exchanged(q: Array, k: Array, v: Array, segments: Array) -> Array:
    """Part of each row [B, T, N, H] with all heads -> whole rows with a part of the heads, and back."""
    S, shards = segments.shape[1], segments.shape[1] // q.shape[1]
    order = sharding.row_order(S, shards)
    repeats = max(1, shards // k.shape[2])  # consecutive query heads share a key head, so copies stand side by side
    k, v = (jnp.repeat(x, repeats, axis=2) for x in (k, v))

    def whole_rows(x: Array) -> Array:
        return jax.lax.all_to_all(x, "context", split_axis=2, concat_axis=1, tiled=True)[:, np.argsort(order)]

    out = _one_device(whole_rows(q), whole_rows(k), whole_rows(v), segments[:, np.argsort(order)])
    return jax.lax.all_to_all(out[:, order], "context", split_axis=1, concat_axis=2, tiled=True)
