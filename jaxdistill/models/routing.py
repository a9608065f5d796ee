"""Which experts a token goes through, and how evenly all tokens fall on them."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float, Int

from jaxdistill.models.config import Config
from jaxdistill.sharding import spec


@struct.dataclass
class Routing:
    """Where a router sends real tokens, summed over those of each device apart, float32 [rows, positions, E]."""

    tokens: Any  # that chose an expert
    probability: Any  # that it was given


def choose(
    scores: Float[Array, "B T E"], real: Bool[Array, "B T"], c: Config
) -> tuple[Float[Array, "B T k"], Int[Array, "B T k"], Routing]:
    """The experts with the highest scores of each token, the float32 shares of what they add, and the routing."""

    def local(scores: Array, real: Array) -> tuple[Array, Array, Routing]:
        probability = jax.nn.softmax(scores.astype(jnp.float32), axis=-1)
        share, expert = jax.lax.top_k(probability, c.experts_per_token)
        if c.normed_choice:
            share /= jnp.sum(share, axis=-1, keepdims=True)
        chosen = (expert[..., None] == jnp.arange(c.experts)) & real[..., None, None]
        tokens = jnp.sum(chosen, axis=(0, 1, 2), dtype=jnp.float32)
        given = jnp.sum(jnp.where(real[..., None], probability, 0), axis=(0, 1))
        return share, expert, Routing(tokens[None, None], given[None, None])

    chosen: Any = jax.shard_map(local, out_specs=spec("BT."))(scores, real)
    return chosen


def balance_loss(routing: Routing, c: Config) -> tuple[Float[Array, ""], Float[Array, "L E"]]:
    """How unevenly tokens fall on experts, experts per token where evenly; and how many chose each, of each layer.

    E times the sum over experts of the share of tokens that chose one x the mean probability it was given, both over
    the tokens of all layers together, as in transformers' `load_balancing_loss_func` (arXiv 2101.03961, equations 4 to
    6, for several experts a token). Its gradient comes through the probabilities alone.

    Args:
      routing: of all layers, stacked on L.
    """
    tokens, probability = (jnp.sum(x, axis=(1, 2)) for x in (routing.tokens, routing.probability))
    rows = jnp.maximum(jnp.sum(tokens) / c.experts_per_token, 1)  # of all layers
    share, given = jnp.sum(tokens, axis=0) / rows, jnp.sum(probability, axis=0) / rows
    return c.experts * jnp.sum(share * given), tokens
