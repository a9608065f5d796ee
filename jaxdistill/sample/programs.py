"""What runs on the devices: reading a piece of a prompt, and some decoding steps, each one jitted call."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float, Int

from jaxdistill import models, sharding, weights
from jaxdistill.models import decoder, quantized
from jaxdistill.models.attention import Scores
from jaxdistill.models.config import Config
from jaxdistill.models.quantized import MatmulDtype
from jaxdistill.sample.attention import Kernel, Pages, Seeing
from jaxdistill.sample.cache import Cache, write_and_attend
from jaxdistill.sample.choose import Counts, Features, Logprobs, Parameters, Rows, choose, logprobs
from jaxdistill.sample.request import TOP_LOGPROBS
from jaxdistill.sharding import spec


@struct.dataclass
class Slots:
    """Where each slot stands; lives on the devices, the host never waits for it."""

    token: Rows  # [B] int32: to be fed next
    position: Rows  # [B] int32: of that token
    produced: Rows  # [B] int32: output tokens so far
    limit: Rows  # [B] int32: output tokens at most
    active: Rows  # [B] bool
    seed: Rows  # [B] int32
    stops: Rows  # [B, n] int32: tokens that end the output; -1 fills up
    parameters: Parameters
    counts: Counts | None  # None in rows that ask for no penalties


@struct.dataclass
class Piece:
    """Consecutive tokens of one context on each of R shards."""

    tokens: Rows  # [R, T] int32
    start: Rows  # [R] int32: position of the first
    count: Rows  # [R] int32: how many of them exist
    tables: Rows  # [R, M] int32: pages
    slot: Rows  # [R] int32: of the shard, to go on from here, where the piece is a context's last; else too large
    targets: Rows | None  # [R, T] int32: what follows each token, where prompt log-probabilities are asked for


@struct.dataclass
class Drawn:
    """Tokens, -1 where there are none, and their log-probabilities if asked for; calls return some steps of them."""

    tokens: Int[Array, "*steps B"]
    logprobs: Logprobs | None


def per_layer(params: decoder.Params, c: Config, dtype: Any, weight_dtype: MatmulDtype = "compute") -> decoder.Params:
    """The weights in compute dtype, with an array of its own for each layer, and not split along context.

    A step unrolls its layers: a slice of stacked weights would be copied, in each layer of each step.

    Args:
      weight_dtype: what the layers' matrices are stored in. All else stays in compute dtype: the embedding, the head,
        norms and biases.

    Raises:
      UserError: 8 bits, and a model with experts.
    """
    quantized.check_model(weight_dtype, c)

    def stored(w: Array, declared: weights.Declared) -> Array:
        return jax.sharding.reshard(w, spec(declared.layer_dims.replace(" ", ""), sharding.STORAGE))

    @functools.partial(jax.jit, static_argnums=1)
    def split(w: Array, declared: weights.Declared) -> tuple[Any, ...]:
        with sharding.whole_rows():
            if weight_dtype == "compute" or len(declared.hf_shape) < 2:
                return tuple(stored(w[i].astype(dtype), declared) for i in range(c.layers))
            parts = [quantized.weight(w[i], declared, weight_dtype) for i in range(c.layers)]
            return tuple(dataclasses.replace(part, values=stored(part.values, declared)) for part in parts)

    @functools.partial(jax.jit, static_argnums=1)
    def whole(w: Array, declared: weights.Declared) -> Array:
        with sharding.whole_rows():
            return stored(w.astype(dtype), declared)

    template = decoder.template(c)
    declared, structure = jax.tree.flatten(template.blocks, is_leaf=weights.is_declared)
    parts = [split(*pair) for pair in zip(jax.tree.leaves(params.blocks), declared, strict=True)]
    blocks = tuple(jax.tree.unflatten(structure, [part[i] for part in parts]) for i in range(c.layers))
    others = (dataclasses.replace(tree, blocks=None) for tree in (params, template))
    return dataclasses.replace(jax.tree.map(whole, *others), blocks=blocks)


def forward(
    params: decoder.Params,
    cache: Cache,
    tokens: Int[Array, "B T"],
    tables: Int[Array, "B M"],
    positions: Int[Array, "B T"],
    live: Bool[Array, "B T"],
    c: Config,
    dtype: Any,
    kernel: Kernel = "xla",
) -> tuple[Float[Array, "B T D"], Cache]:
    """Hidden states of new tokens after what their pages hold, and the cache with them added.

    Args:
      params: with its layers apart, as `per_layer` gives them.
      live: tokens that exist.
    """
    block = models.family(c.model_type).block
    with sharding.whole_rows():
        tokens, positions, live = (sharding.relayout(a, "BT") for a in (tokens, positions, live))
        angles = decoder.angles_of_kinds(positions, c)
        scores = Scores(c.score_scale, c.score_cap)
        x = decoder.embed(params, tokens, c, dtype)
        layers = []
        for i, (w, pages) in enumerate(zip(params.blocks, cache, strict=True)):
            windowed = bool(c.windowed) and c.windowed[i]
            how = Seeing(scores, c.window if windowed else None, kernel)

            def attend(q: Array, k: Array, v: Array, pages: Pages = pages, how: Seeing = how) -> tuple[Array, Pages]:
                return write_and_attend(q, k, v, pages, tables, positions, live, how)

            x, pages = block(x, w, angles(windowed), attend, c, quantized.stored_projection)
            layers.append(pages)
        return decoder.final(params, x, c), tuple(layers)


def _logits(params: decoder.Params, x: Float[Array, "B T D"], c: Config) -> Float[Array, "B T V"]:
    """One row's vocabulary is gathered: to draw across shards would cost more."""
    with sharding.whole_rows():
        return jax.sharding.reshard(decoder.logits(params, x, c), jax.P(*spec("BT"), None))


def _draw(logits: Float[Array, "B V"], s: Slots, features: Features) -> Drawn:
    tokens = choose(logits, s.parameters, s.counts, s.seed, s.produced, features)
    return Drawn(tokens=tokens, logprobs=logprobs(logits, tokens) if features.logprobs else None)


def _advance(s: Slots, tokens: Int[Array, " B"], features: Features) -> Slots:
    """Active slots after they drew these tokens, which are fed next."""
    produced = s.produced + s.active
    stopped = jnp.any(tokens[:, None] == s.stops, axis=1)
    counts = s.counts
    if features.penalties:
        assert counts is not None
        is_token = jax.lax.broadcasted_iota(jnp.int32, counts.said.shape, 1) == tokens[:, None]
        counts = Counts(prompted=counts.prompted, said=counts.said + (is_token & s.active[:, None]))
    return dataclasses.replace(
        s,
        token=tokens,
        position=s.position + s.active,
        produced=produced,
        active=s.active & ~stopped & (produced < s.limit),
        counts=counts,
    )


@functools.partial(jax.jit, static_argnames=("c", "dtype", "features", "kernel"), donate_argnums=(1, 2))
def prefill(
    params: decoder.Params,
    cache: Cache,
    state: Slots,
    piece: Piece,
    rows: Slots,
    *,
    c: Config,
    dtype: Any,
    features: Features,
    kernel: Kernel = "xla",
) -> tuple[Cache, Slots, Drawn, Logprobs | None]:
    """Reads a piece; where it is a context's last, draws the token after it and makes the slot go on from there.

    Args:
      rows: the slots as they stand at the last token of the piece, a row a shard; `token` is not looked at.

    Returns:
      Also what was drawn, in one step, and log-probabilities of the targets [R, T].
    """
    offsets = jnp.arange(piece.tokens.shape[1])
    positions, live = piece.start[:, None] + offsets, offsets < piece.count[:, None]
    x, cache = forward(params, cache, piece.tokens, piece.tables, positions, live, c, dtype, kernel)
    of_targets = None
    if piece.targets is not None:
        of_targets = logprobs(_logits(params, x, c), piece.targets)
    last = jnp.maximum(piece.count - 1, 0)[:, None, None]
    x = jnp.sum(jnp.where(offsets[:, None] == last, x, 0), axis=1, keepdims=True)
    drawn = _draw(_logits(params, x, c)[:, 0], rows, features)
    rows = _advance(rows, drawn.tokens, features)
    drawn = jax.tree.map(lambda a: a[None], drawn)
    return cache, _enter(state, piece.slot, rows), drawn, of_targets


def _enter(state: Slots, slot: Int[Array, " R"], rows: Slots) -> Slots:
    """The slots with new rows in their places; a place past the end is nowhere."""
    counts = state.counts
    if rows.counts is None:
        state = dataclasses.replace(state, counts=None)

    def local(state: Slots, slot: Array, rows: Slots) -> Slots:
        return jax.tree.map(lambda a, row: a.at[slot].set(row, mode="drop"), state, rows)

    entered = jax.shard_map(local, in_specs=spec("B"), out_specs=spec("B"))(state, slot, rows)
    return entered if rows.counts is not None else dataclasses.replace(entered, counts=counts)


@functools.partial(jax.jit, static_argnames=("c", "dtype", "features", "most_steps", "kernel"), donate_argnums=(1, 2))
def decode(
    params: decoder.Params,
    cache: Cache,
    state: Slots,
    tables: Int[Array, "B M"],
    keep: Bool[Array, " B"],
    steps: Int[Array, ""],
    *,
    c: Config,
    dtype: Any,
    features: Features,
    most_steps: int,
    kernel: Kernel = "xla",
) -> tuple[Cache, Slots, Drawn]:
    """A token for every active slot, `steps` times; ends early when none is left.

    Args:
      keep: slots that may go on; the others become inactive.
    """
    state = dataclasses.replace(state, active=state.active & keep)

    def step(carry: tuple[Array, Cache, Slots, Drawn]) -> tuple[Array, Cache, Slots, Drawn]:
        i, cache, s, out = carry
        token, position, active = s.token[:, None], s.position[:, None], s.active[:, None]
        x, cache = forward(params, cache, token, tables, position, active, c, dtype, kernel)
        drawn = _draw(_logits(params, x, c)[:, 0], s, features)
        shown = dataclasses.replace(drawn, tokens=jnp.where(s.active, drawn.tokens, -1))
        out = jax.tree.map(lambda a, new: jax.lax.dynamic_update_index_in_dim(a, new, i, axis=0), out, shown)
        return i + 1, cache, _advance(s, drawn.tokens, features), out

    def blank(dtype: Any, *more: int) -> Array:
        mesh = jax.sharding.get_abstract_mesh()
        layout = jax.sharding.NamedSharding(mesh, jax.P(None, *spec("B")))
        return jax.lax.full((most_steps, *keep.shape, *more), -1, dtype, sharding=layout)

    out, top = Drawn(tokens=blank(jnp.int32), logprobs=None), min(TOP_LOGPROBS, c.vocab)
    if features.logprobs:
        of_tokens = Logprobs(chosen=blank(jnp.float32), top=blank(jnp.float32, top), tokens=blank(jnp.int32, top))
        out = Drawn(tokens=out.tokens, logprobs=of_tokens)
    start = (jnp.zeros((), jnp.int32), cache, state, out)
    _, cache, state, out = jax.lax.while_loop(lambda carry: (carry[0] < steps) & jnp.any(carry[2].active), step, start)
    return cache, state, out
