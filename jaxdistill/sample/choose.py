"""From logits to the next token: penalties, temperature, filters, and a random stream of each request's own."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float, Int

from jaxdistill.sample.request import TOP_LOGPROBS

Rows = Any  # a jax.Array, or what stands for one: an array still on the host, a layout


class Features(NamedTuple):
    """What the requests at hand ask of a step: each combination is a program of its own, none costs the others.

    A token is the same in every program that draws it: what a row does not ask for leaves it as it is.
    """

    draws: bool = False  # some temperature is above 0
    filters: bool = False  # some request sets top_k, top_p or min_p
    penalties: bool = False
    logprobs: bool = False

    def __or__(self, other: "Features") -> "Features":
        return Features(*(a or b for a, b in zip(self, other, strict=True)))


@struct.dataclass
class Parameters:
    """Sampling settings of each row; the names are those of SamplingConfig."""

    temperature: Rows  # [B] float32
    top_k: Rows  # [B] int32
    top_p: Rows  # [B] float32
    min_p: Rows  # [B] float32
    repetition_penalty: Rows  # [B] float32
    presence_penalty: Rows  # [B] float32
    frequency_penalty: Rows  # [B] float32


@struct.dataclass
class Counts:
    """What each row's penalties look at."""

    prompted: Rows  # [B, V] bool: tokens of the prompt
    said: Rows  # [B, V] int32: how often each token is in the output


@struct.dataclass
class Logprobs:
    """Of one token a row, and of the most likely ones in its place."""

    chosen: Float[Array, "*rows"]
    top: Float[Array, "*rows C"]
    tokens: Int[Array, "*rows C"]


def penalize(logits: Float[Array, "B V"], counts: Counts, p: Parameters) -> Float[Array, "B V"]:
    """Repetition as in transformers, presence and frequency as OpenAI defines them."""
    repetition = p.repetition_penalty[:, None]
    repeated = jnp.where(logits > 0, logits / repetition, logits * repetition)
    logits = jnp.where(counts.prompted | (counts.said > 0), repeated, logits)
    presence = p.presence_penalty[:, None] * (counts.said > 0)
    return logits - presence - p.frequency_penalty[:, None] * counts.said


def filtered(logits: Float[Array, "B V"], p: Parameters) -> Float[Array, "B V"]:
    """Minus infinity where top-k, top-p or min-p drop a token; `logits` are over temperature.

    Nothing is sorted: each filter is a threshold, found by bisection, and tokens that tie with the last one stay.
    """
    k = jnp.where(p.top_k > 0, p.top_k, logits.shape[-1]).astype(jnp.float32)
    kept = logits >= _threshold(logits, jnp.ones_like(logits), k)
    best = jnp.max(logits, axis=-1, keepdims=True)
    weights = jnp.where(kept, jnp.exp(logits - best), 0.0)
    enough = jnp.where(p.top_p < 1, p.top_p * jnp.sum(weights, axis=-1), jnp.inf)
    kept &= logits >= _threshold(logits, weights, enough)
    kept &= logits >= best + jnp.log(p.min_p)[:, None]
    return jnp.where(kept, logits, -jnp.inf)


def _threshold(logits: Float[Array, "B V"], weights: Float[Array, "B V"], enough: Float[Array, " B"]) -> Array:
    """The smallest logit [B, 1] above which the weights sum to less than `enough`."""
    order = _order(logits)

    def halve(_: Any, bounds: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = bounds
        middle = (low & high) + ((low ^ high) >> 1)  # their mean, rounded down, without overflow
        fits = jnp.sum(jnp.where(order > middle, weights, 0.0), axis=-1, keepdims=True) < enough[:, None]
        return jnp.where(fits, low, middle + 1), jnp.where(fits, middle, high)

    bounds = jnp.min(order, axis=-1, keepdims=True), jnp.max(order, axis=-1, keepdims=True)
    low, _ = jax.lax.fori_loop(0, 32, halve, bounds)
    return jax.lax.bitcast_convert_type(jnp.where(low < 0, low ^ 0x7FFFFFFF, low), jnp.float32)


def _order(x: Array) -> Array:
    """Integers in the order of float32 numbers."""
    bits = jax.lax.bitcast_convert_type(x, jnp.int32)
    return jnp.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


def choose(
    logits: Float[Array, "B V"],
    p: Parameters,
    counts: Counts | None,
    seeds: Int[Array, " B"],
    produced: Int[Array, " B"],
    features: Features,
) -> Int[Array, " B"]:
    """The next token of each row. A row's noise is a function of its seed, its count of tokens, and the token."""
    if features.penalties:
        assert counts is not None
        logits = penalize(logits, counts, p)
    best = jnp.argmax(logits, axis=-1).astype(jnp.int32)
    if not features.draws:
        return best
    logits = logits / jnp.where(p.temperature > 0, p.temperature, 1.0)[:, None]
    if features.filters:
        logits = filtered(logits, p)

    def noise(seed: Array, count: Array) -> Array:
        return jax.random.gumbel(jax.random.fold_in(jax.random.key(seed), count), logits.shape[-1:])

    drawn = jnp.argmax(logits + jax.vmap(noise)(seeds, produced), axis=-1).astype(jnp.int32)
    return jnp.where(p.temperature > 0, drawn, best)


def logprobs(logits: Float[Array, "*rows V"], tokens: Int[Array, "*rows"]) -> Logprobs:
    """Log-softmax of `tokens` and of the most likely ones."""
    total = jax.nn.logsumexp(logits, axis=-1, keepdims=True)
    is_token = jax.lax.broadcasted_iota(jnp.int32, logits.shape, logits.ndim - 1) == tokens[..., None]
    # A lookup by index would not keep the rows' layout
    chosen = jnp.sum(jnp.where(is_token, logits, 0.0), axis=-1) - total[..., 0]
    top, indices = jax.lax.top_k(logits, min(TOP_LOGPROBS, logits.shape[-1]))
    return Logprobs(chosen=chosen, top=top - total, tokens=indices)
