"""Attention within the documents of packed rows, whose positions may be split over the context axis."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jaxtyping import Array, Float, Int

from jaxdistill import sharding
from jaxdistill.models.attention import PLAIN, Attention, Scores, blockwise, cudnn, mosaic, splash
from jaxdistill.sharding import relayout, spec


def packed_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    segments: Int[Array, "B T"],
    attention: Attention,
    scores: Scores = PLAIN,
    window: int | Int[Array, ""] | None = None,
) -> Float[Array, "B T N H"]:
    """Causal attention within the documents of packed rows; softmax in float32.

    Args:
      segments: the document of each position, and of padding; all arguments stand as `sharding.row_order` has them.
      attention: the backend, and what moves where rows are split. "all_gather": keys and values to every device,
        queries stay. "ulysses" (arXiv 2309.14509): positions are exchanged for heads, so each device sees whole rows
        of its heads; key/value heads are repeated where they are fewer than the devices.
      scores: what a backend does not compute is refused at the start (`backends.check`).
      window: a query sees so many keys at most, its own the last of them; all of its document's by default.
    """
    if jax.sharding.get_abstract_mesh().shape["context"] == 1:
        local = _whole_rows
    else:
        local = {"all_gather": _gathered, "ulysses": _exchanged}[attention.context]
    run = jax.shard_map(
        lambda q, k, v, segments, *window: local(_backend(attention, scores, *window), q, k, v, segments),
        in_specs=(spec("BTNH"), spec("BTKH"), spec("BTKH"), spec("BS"), *[jax.P()] * (window is not None)),
        out_specs=spec("BTNH"),
        check_vma=False,  # each device runs its loops over keys to its own end
    )
    return run(q, k, v, relayout(segments, "BS"), *([] if window is None else [jnp.asarray(window, jnp.int32)]))


def _backend(attention: Attention, scores: Scores, window: Array | None = None) -> Callable[..., Array]:
    if attention.backend in ("blockwise", "mosaic"):
        attend = blockwise.attend if attention.backend == "blockwise" else mosaic.attend
        return functools.partial(attend, scores=scores, window=window)
    assert (scores.cap, window) == (None, None), "backends.check lets nothing else come here"
    if attention.backend == "cudnn":
        return functools.partial(cudnn.attend, most=attention.segments, scores=scores)
    return functools.partial(splash.attend, scores=scores)


def query_order(length: int, shards: int) -> Int[np.ndarray, "R c t"]:
    """The positions of a row that each of R shards holds: `sharding.row_order` in c stretches of consecutive ones."""
    return sharding.row_order(length, shards).reshape(shards, 1 if shards == 1 else 2, -1)


def _whole_rows(attend: Callable[..., Array], q: Array, k: Array, v: Array, segments: Array) -> Array:
    return attend(q, k, v, segments, query_order(q.shape[1], 1), 0)


def _gathered(attend: Callable[..., Array], q: Array, k: Array, v: Array, segments: Array) -> Array:
    """Two chunks of each row's queries [B, T, N, H] against all of its keys, gathered here: gradients then scatter."""
    S, shards = segments.shape[1], segments.shape[1] // q.shape[1]
    # Stacked, not joined: see `sharding.gather`
    k, v = (rearrange(jax.lax.all_gather(x, "context", axis=1), "B n t K H -> B (n t) K H") for x in (k, v))
    k, v, segments = (_unzigzag(x, shards) for x in (k, v, segments))
    return attend(q, k, v, segments, query_order(S, shards), jax.lax.axis_index("context"))


def _exchanged(attend: Callable[..., Array], q: Array, k: Array, v: Array, segments: Array) -> Array:
    """Part of each row [B, T, N, H] with all heads -> whole rows with a part of the heads, and back."""
    shards = segments.shape[1] // q.shape[1]
    repeats = max(1, shards // k.shape[2])  # consecutive query heads share a key head, so copies stand side by side
    k, v = (jnp.repeat(x, repeats, axis=2) for x in (k, v))

    def whole_rows(x: Array) -> Array:
        return _unzigzag(jax.lax.all_to_all(x, "context", split_axis=2, concat_axis=1, tiled=True), shards)

    out = _whole_rows(attend, whole_rows(q), whole_rows(k), whole_rows(v), _unzigzag(segments, shards))
    return jax.lax.all_to_all(_zigzag(out, shards), "context", split_axis=1, concat_axis=2, tiled=True)


def _unzigzag(x: Array, shards: int) -> Array:
    """Whole rows [B, S, ...] in `sharding.row_order` -> in the order of positions.

    Chunks are sliced and joined; an index per position would be a gather, and its gradient a scatter.
    """
    pairs = rearrange(x, "B (n two t) ... -> B n two t ...", n=shards, two=2)
    halves = jnp.stack([pairs[:, :, 0], pairs[:, ::-1, 1]], axis=1)
    return rearrange(halves, "B two n t ... -> B (two n t) ...")


def _zigzag(x: Array, shards: int) -> Array:
    """The inverse of `_unzigzag`."""
    halves = rearrange(x, "B (two n t) ... -> B two n t ...", n=shards, two=2)
    pairs = jnp.stack([halves[:, 0], halves[:, 1, ::-1]], axis=2)
    return rearrange(pairs, "B n two t ... -> B (n two t) ...")
