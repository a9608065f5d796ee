"""From logits to the next token: temperature, top-k, top-p, min-p, and a random stream of each request's own."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxdistill.errors import UserError


@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplingConfig:
    """How tokens are drawn; filters apply in the order of the fields, as in transformers."""

    temperature: float = 0.0  # 0 takes the most likely token
    top_k: int = 0  # keep this many tokens; 0 keeps all
    top_p: float = 1.0  # keep the most likely tokens that together reach this probability
    min_p: float = 0.0  # keep tokens at least this likely relative to the most likely one
    max_new_tokens: int = 2048  # output tokens of a request

    def __post_init__(self):
        if self.temperature < 0:
            raise UserError(f"temperature is {self.temperature}; expected 0 (greedy) or more")
        if self.top_k < 0 or not 0 < self.top_p <= 1 or not 0 <= self.min_p <= 1:
            raise UserError(
                f"top_k {self.top_k}, top_p {self.top_p}, min_p {self.min_p}; expected top_k >= 0 (0: off), "
                "0 < top_p <= 1 (1: off), 0 <= min_p <= 1 (0: off)"
            )
        if self.max_new_tokens < 1:
            raise UserError(f"max_new_tokens is {self.max_new_tokens}; expected 1 or more")


def candidates(logits: Float[Array, "B V"], c: SamplingConfig) -> tuple[Float[Array, "B C"], Int[Array, "B C"]]:
    """Logits over temperature of what may be drawn, minus infinity where a filter drops it, and the tokens they are of.

    C is V, or top_k where that is fewer.
    """
    logits = logits / c.temperature
    tokens = jax.lax.broadcasted_iota(jnp.int32, logits.shape, 1)
    if c.top_k or c.top_p < 1:
        # With top-k, all that follows looks at the k best only: no sort of the whole vocabulary, no noise for it
        logits, tokens = jax.lax.top_k(logits, min(c.top_k or logits.shape[-1], logits.shape[-1]))
    if c.top_p < 1:
        probabilities = jax.nn.softmax(logits, axis=-1)
        before = jnp.cumsum(probabilities, axis=-1) - probabilities
        logits = jnp.where(before < c.top_p, logits, -jnp.inf)  # the one that crosses stays
    if c.min_p:
        best = jnp.max(logits, axis=-1, keepdims=True)
        logits = jnp.where(logits < best + jnp.log(c.min_p), -jnp.inf, logits)
    return logits, tokens


def choose(
    logits: Float[Array, "B V"], seeds: Int[Array, " B"], produced: Int[Array, " B"], c: SamplingConfig
) -> Int[Array, " B"]:
    """The next token of each row. A row's noise is a function of its seed and its count of tokens so far."""
    if c.temperature == 0:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    logits, tokens = candidates(logits, c)

    def noise(seed: Array, count: Array) -> Array:
        return jax.random.gumbel(jax.random.fold_in(jax.random.key(seed), count), logits.shape[-1:])

    drawn = jnp.argmax(logits + jax.vmap(noise)(seeds, produced), axis=-1, keepdims=True)
    is_drawn = jax.lax.broadcasted_iota(jnp.int32, tokens.shape, 1) == drawn
    return jnp.sum(jnp.where(is_drawn, tokens, 0), axis=-1)  # a lookup by index would not keep the rows' layout
