"""Continuous batching over a fixed set of slots: prompts enter in chunks, decoding runs many steps a call."""

import dataclasses
from collections import deque
from collections.abc import Iterable, Iterator
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Bool, Int

from jaxdistill import models, sharding
from jaxdistill.errors import UserError
from jaxdistill.models import decoder, embedding
from jaxdistill.models.config import Config
from jaxdistill.models.layers import rms_norm, rope_angles
from jaxdistill.sample import cache as kv
from jaxdistill.sample.choose import SamplingConfig, choose
from jaxdistill.sharding import spec


@dataclasses.dataclass(frozen=True)
class Request:
    """One prompt to continue."""

    id: str
    prompt: tuple[int, ...]
    seed: int = 0


@dataclasses.dataclass(frozen=True)
class Output:
    """What a request became; the stop token is not part of the tokens."""

    id: str
    tokens: tuple[int, ...]
    finish_reason: Literal["stop", "length"]


@struct.dataclass
class Slots:
    """Where each slot stands; lives on the devices between calls."""

    token: Int[Array, " B"]  # to be fed next
    position: Int[Array, " B"]  # of that token
    produced: Int[Array, " B"]  # output tokens so far
    seed: Int[Array, " B"]
    active: Bool[Array, " B"]


def forward(
    params: decoder.Params,
    cache: kv.Cache,
    tokens: Int[Array, "B T"],
    slots: Int[Array, " B"],
    positions: Int[Array, "B T"],
    live: Bool[Array, "B T"],
    c: Config,
    dtype: Any,
) -> tuple[Array, kv.Cache]:
    """Hidden states [B, T, D] of new tokens after what their slots hold, and the cache with them added."""
    block = models.family(c.model_type).block
    tokens, positions, live = (sharding.relayout(a, "BT") for a in (tokens, positions, live))
    angles = rope_angles(positions, c.rope, c.head_dim)

    def layer(carry: tuple[Array, kv.Cache], item: tuple[Any, Array]) -> tuple[tuple[Array, kv.Cache], None]:
        x, cache = carry
        w, i = item

        def attend(q: Array, k: Array, v: Array) -> tuple[Array, kv.Cache]:
            return kv.write_and_attend(q, k, v, cache, i, slots, positions, live)

        return block(x, w, angles, attend, c), None

    x = embedding.lookup(params.embed, tokens, dtype)
    (x, cache), _ = jax.lax.scan(layer, (x, cache), (params.blocks, jnp.arange(c.layers)))
    return rms_norm(x, params.final_norm, c.norm_eps), cache


class Engine:
    """Samples from a model on the current mesh; compiled once for its shapes, used for any number of requests.

    A request's tokens do not depend on its slot or its neighbours: shapes are fixed, rows are independent, and
    attention adds keys up in an order of its own.

    Args:
      slots: requests decoded at once; a multiple of the mesh's data x fsdp.
      positions: longest prompt and output together, in tokens.
    """

    def __init__(
        self,
        params: decoder.Params,
        config: Config,
        sampling: SamplingConfig,
        stop_tokens: Iterable[int],
        slots: int = 32,
        positions: int = 4096,
        dtype: Any = jnp.bfloat16,
        prefill_tokens: int = 128,
        steps_per_call: int = 32,
    ):
        mesh = dict(jax.sharding.get_mesh().shape)
        self.shards = mesh["data"] * mesh["fsdp"]
        if mesh["context"] > 1:
            raise UserError(f"sampling does not split positions: mesh.context is {mesh['context']}, expected 1")
        if slots % self.shards:
            raise UserError(f"slots is {slots}; expected a multiple of data x fsdp = {self.shards}")
        if positions > config.max_positions:
            raise UserError(
                f"{positions} positions were asked for, but the model was made for {config.max_positions}; "
                "use shorter prompts or a smaller max_new_tokens"
            )
        self.params = jax.tree.map(lambda w: w.astype(dtype), params)
        self.config, self.sampling, self.dtype = config, sampling, dtype
        self.slots, self.positions = slots, positions
        self.prefill_tokens, self.steps_per_call = prefill_tokens, steps_per_call
        self.stop_tokens = tuple(stop_tokens)
        self.cache = kv.empty(config, slots, positions, dtype)
        self._prefill = jax.jit(self._prefill_impl, donate_argnums=1)
        self._decode = jax.jit(self._decode_impl, donate_argnums=(1, 2))

    def _prefill_impl(
        self,
        params: decoder.Params,
        cache: kv.Cache,
        tokens: Array,
        slots: Array,
        start: Array,
        count: Array,
        seed: Array,
    ) -> tuple[Array, kv.Cache]:
        """One chunk of one prompt on each shard [shards, T]; the token drawn after it (used if the prompt ends)."""
        offsets = jnp.arange(tokens.shape[1])
        positions, live = start[:, None] + offsets, offsets < count[:, None]
        x, cache = forward(params, cache, tokens, slots, positions, live, self.config, self.dtype)
        last = jnp.maximum(count - 1, 0)[:, None, None]
        x = jnp.sum(jnp.where(jnp.arange(x.shape[1])[:, None] == last, x, 0), axis=1, keepdims=True)
        return self._choose(params, x, seed, jnp.zeros_like(seed)), cache

    def _choose(self, params: decoder.Params, x: Array, seed: Array, produced: Array) -> Array:
        # One row's vocabulary is gathered: sorting and drawing across shards would cost more
        logits = jax.sharding.reshard(decoder.logits(params, x)[:, 0], jax.P(*spec("B"), None))
        return choose(logits, seed, produced, self.sampling)

    def _decode_impl(self, params: decoder.Params, cache: kv.Cache, state: Slots, limit: Array) -> Any:
        """Up to steps_per_call tokens for every active slot; ends early when none is left."""
        local = jnp.tile(jnp.arange(self.slots // self.shards), self.shards)
        rows = jax.sharding.reshard(local, spec("B"))
        stops = jnp.array(self.stop_tokens, jnp.int32)

        def step(carry: tuple[Array, kv.Cache, Slots, Array]) -> tuple[Array, kv.Cache, Slots, Array]:
            i, cache, s, out = carry
            live = s.active[:, None]
            x, cache = forward(
                params, cache, s.token[:, None], rows, s.position[:, None], live, self.config, self.dtype
            )
            token = self._choose(params, x, s.seed, s.produced)
            out = jax.lax.dynamic_update_slice_in_dim(out, jnp.where(s.active, token, -1)[None], i, axis=0)
            stopped = jnp.any(token[:, None] == stops, axis=1)
            produced = s.produced + s.active
            s = dataclasses.replace(
                s,
                token=token,
                position=s.position + s.active,
                produced=produced,
                active=s.active & ~stopped & (produced < limit),
            )
            return i + 1, cache, s, out

        out = jax.lax.full((self.steps_per_call, self.slots), -1, jnp.int32, sharding=out_layout())
        start = (jnp.zeros((), jnp.int32), cache, state, out)
        _, cache, state, out = jax.lax.while_loop(
            lambda carry: (carry[0] < self.steps_per_call) & jnp.any(carry[2].active), step, start
        )
        return cache, state, out

    def generate(self, requests: Iterable[Request]) -> Iterator[Output]:
        """Yields each request's output as it finishes, in order of finishing.

        Raises:
          UserError: a prompt leaves no room for output, a token is not in the vocabulary, or a seed is out of range;
            refused before anything is sampled.
        """
        queue = deque(requests)
        for request in queue:
            if len(request.prompt) >= self.positions or not request.prompt:
                raise UserError(
                    f"request {request.id}: the prompt has {len(request.prompt)} tokens; "
                    f"expected 1 to {self.positions - 1} ({self.positions} positions for prompt and output)"
                )
            unknown = [token for token in request.prompt if not 0 <= token < self.config.vocab]
            if unknown:
                raise UserError(
                    f"request {request.id}: token {unknown[0]} is outside the model's vocabulary of "
                    f"{self.config.vocab}; the tokenizer and the model do not belong together"
                )
            if not 0 <= request.seed < 2**31:
                raise UserError(f"request {request.id}: seed {request.seed}; expected 0 to {2**31 - 1}")
        yield from _Schedule(self, queue).run()


def out_layout() -> jax.sharding.NamedSharding:
    """Layout of [steps, B] tokens."""
    return jax.sharding.NamedSharding(jax.sharding.get_abstract_mesh(), jax.P(None, *spec("B")))


class _Schedule:
    """One call of `generate`: which request sits in which slot, and what it has said."""

    def __init__(self, engine: Engine, queue: deque[Request]):
        self.engine, self.queue = engine, queue
        self.slot_of_row: list[Request | None] = [None] * engine.slots
        self.said: list[list[int]] = [[] for _ in range(engine.slots)]
        self.host = {
            name: np.zeros(engine.slots, np.bool_ if name == "active" else np.int32)
            for name in ("token", "position", "produced", "seed", "active")
        }
        self.limit = np.zeros(engine.slots, np.int32)

    def run(self) -> Iterator[Output]:
        engine = self.engine
        while self.queue or self.host["active"].any():
            yield from self._admit()
            if not self.host["active"].any():
                continue
            state = Slots(**{name: sharding.put(values, "B") for name, values in self.host.items()})
            limit = sharding.put(self.limit, "B")
            engine.cache, state, out = engine._decode(engine.params, engine.cache, state, limit)
            tokens = np.asarray(out)
            self.host = {name: np.array(getattr(state, name)) for name in self.host}
            for slot, request in enumerate(self.slot_of_row):
                if request is None:
                    continue
                new = tokens[:, slot]
                self.said[slot] += new[new >= 0].tolist()
                if not self.host["active"][slot]:
                    yield self._finish(slot, request)

    def _finish(self, slot: int, request: Request) -> Output:
        said, self.said[slot], self.slot_of_row[slot] = self.said[slot], [], None
        stopped = bool(said) and said[-1] in self.engine.stop_tokens
        return Output(request.id, tuple(said[:-1] if stopped else said), "stop" if stopped else "length")

    def _admit(self) -> Iterator[Output]:
        """Puts waiting requests into free slots, one on each shard at a time, and reads their prompts."""
        per_shard = self.engine.slots // self.engine.shards
        while self.queue:
            batch: list[tuple[int, int, Request]] = []  # shard, slot, request
            for shard in range(self.engine.shards):
                own = range(shard * per_shard, (shard + 1) * per_shard)
                free = next((slot for slot in own if self.slot_of_row[slot] is None), None)
                if free is not None and self.queue:
                    batch.append((shard, free, self.queue.popleft()))
            if not batch:
                return
            first = self._read_prompts(batch, per_shard)
            for shard, slot, request in batch:
                self.slot_of_row[slot] = request
                self.said[slot] = [int(first[shard])]
                self.limit[slot] = min(self.engine.sampling.max_new_tokens, self.engine.positions - len(request.prompt))
                values = (first[shard], len(request.prompt), 1, request.seed)
                for name, value in zip(("token", "position", "produced", "seed"), values, strict=True):
                    self.host[name][slot] = value
                goes_on = first[shard] not in self.engine.stop_tokens and self.limit[slot] > 1
                self.host["active"][slot] = goes_on
                if not goes_on:
                    yield self._finish(slot, request)

    def _read_prompts(self, batch: list[tuple[int, int, Request]], per_shard: int) -> np.ndarray:
        """Feeds the prompts chunk by chunk; returns the first output token by shard."""
        engine, shards, chunk = self.engine, self.engine.shards, self.engine.prefill_tokens
        first = np.zeros(shards, np.int32)
        for start in range(0, max(len(r.prompt) for _, _, r in batch), chunk):
            tokens = np.zeros((shards, chunk), np.int32)
            slots, count, seed = (np.zeros(shards, np.int32) for _ in range(3))
            for shard, slot, request in batch:
                piece = request.prompt[start : start + chunk]
                tokens[shard, : len(piece)] = piece
                slots[shard], count[shard], seed[shard] = slot % per_shard, len(piece), request.seed
            rows = [sharding.put(x, "B") for x in (slots, np.full(shards, start, np.int32), count, seed)]
            drawn, engine.cache = engine._prefill(engine.params, engine.cache, sharding.put(tokens, "BT"), *rows)
            ends = count > 0
            first[ends] = np.asarray(drawn)[ends]
        return first
