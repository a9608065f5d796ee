"""Continuous batching: requests enter and leave slots while others decode, and the devices never wait for the host."""

import collections
import dataclasses
import itertools
import os
from collections.abc import Iterable, Iterator
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from jaxdistill.errors import UserError
from jaxdistill.models import decoder
from jaxdistill.models.config import Config
from jaxdistill.models.quantized import MatmulDtype
from jaxdistill.sample import cache as kv
from jaxdistill.sample import programs, transfer
from jaxdistill.sample.attention import Kernel, check_kernel
from jaxdistill.sample.choose import Logprobs
from jaxdistill.sample.programs import Drawn, Piece
from jaxdistill.sample.request import Event, Output, Request
from jaxdistill.sample.schedule import Scheduler, Sequence, Shape

_LONGEST_PIECE = 16_384  # tokens: what the layers do at a time, without cutting it in stretches
_MEMORY_SHARE = 0.85  # of what a device has left beside the weights, for the cache


@dataclasses.dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """How the sampler uses its devices. None of it changes what a request says."""

    slots: int = 32  # requests decoded at once, rounded up to a multiple of the mesh's data x fsdp
    cache_tokens: int | None = None  # positions that the cache holds; by default all slots full, or what memory holds
    page_tokens: int = 128  # positions of a page of the cache; requests share whole pages of their prompts
    prefill_tokens: int = 128  # prompt tokens read in one call on each device
    prefill_calls: int = 8  # such calls between two decode calls of `step`, so that prompts never stall who decodes
    steps_per_call: int = 16  # tokens decoded in one call
    compute_dtype: Literal["bfloat16", "float32"] = "bfloat16"  # of weights, cache and activations
    weight_dtype: MatmulDtype = (
        "compute"  # that the layers' matrices are stored in: 8 bits are half of bfloat16's bytes
    )
    cache_dtype: kv.CacheDtype = "compute"  # that keys and values are stored in
    attention: Kernel = "xla"  # what reads the cache: XLA's own programs, or one kernel for GPUs or for TPUs

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, int) and value < 1:
                raise UserError(f"{field.name} is {value}; expected 1 or more")
        if self.prefill_tokens > _LONGEST_PIECE:
            raise UserError(f"prefill_tokens is {self.prefill_tokens}; expected at most {_LONGEST_PIECE}")


@dataclasses.dataclass(frozen=True)
class _Call:
    """A call that was dispatched, and whose tokens it draws."""

    members: list[tuple[int, Sequence, int]]  # row, whose, tokens at most
    drawn: Drawn
    of_prompts: dict[int, tuple[Sequence, tuple[int, ...]]]  # by row, whose prompt's log-probabilities, and the tokens
    of_targets: Logprobs | None


class Engine:
    """Samples from a model on the current mesh; compiled once for its shapes, used for any number of requests.

    A request's tokens do not depend on its slot, its neighbours, or on when it came: shapes are fixed, rows are
    independent, attention adds keys up in an order of its own, and noise is a function of seed and count.

    Not for several threads; whoever calls it needs the mesh it was made on.

    Args:
      stop_tokens: of the model; they end every request.
      positions: longest prompt and output together, in tokens.
    """

    def __init__(
        self,
        params: decoder.Params,
        model: Config,
        stop_tokens: Iterable[int],
        positions: int,
        config: EngineConfig = EngineConfig(),
    ):
        mesh = dict(jax.sharding.get_mesh().shape)
        shards = mesh["data"] * mesh["fsdp"]
        if config.page_tokens % mesh["context"]:
            raise UserError(
                f"mesh.context {mesh['context']} does not split pages of {config.page_tokens} positions evenly; "
                "set page_tokens to a multiple of it"
            )
        if positions > model.max_positions:
            raise UserError(
                f"{positions} positions were asked for, but the model was made for {model.max_positions}; "
                "use shorter prompts or a smaller max_new_tokens"
            )
        self.model, self.config, self.positions = model, config, positions
        self.stop_tokens = tuple(stop_tokens)
        self.dtype = jnp.dtype(config.compute_dtype)
        check_kernel(config.attention, model.head_dim, config.page_tokens // mesh["context"], config.cache_dtype)
        self.params = programs.per_layer(params, model, self.dtype, config.weight_dtype)
        slots = -(-config.slots // shards) * shards
        self.shape = Shape(
            slots=slots,
            positions=positions,
            page_tokens=config.page_tokens,
            pages=self._pages(slots, shards, mesh["context"] * mesh["tensor"]),
            shards=shards,
        )
        self.schedule = Scheduler(self.shape)
        self._cache = kv.empty(model, self.shape.pages * shards, config.page_tokens, self.dtype, config.cache_dtype)
        self._state = transfer.put(transfer.slots(slots, {}, (), model.vocab, penalties=True))
        self._reading: dict[int, Sequence] = {}  # whose context each shard reads
        self._pending: collections.deque[_Call] = collections.deque()
        self._live: dict[str, Sequence] = {}

    def _pages(self, slots: int, shards: int, parts: int) -> int:
        """Pages of the cache on each shard, which consists of so many devices."""
        size, request = self.config.page_tokens, -(-self.positions // self.config.page_tokens)
        if self.config.cache_tokens is not None:
            return self.config.cache_tokens // (size * shards)
        wanted = slots // shards * request
        statistics = jax.local_devices()[0].memory_stats()
        if statistics:
            free = statistics["bytes_limit"] - statistics["bytes_in_use"]
        else:  # a CPU, whose devices share the memory
            free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES") // jax.local_device_count()
        page = kv.page_bytes(self.model, size, self.dtype, self.config.cache_dtype) // parts
        return min(wanted, max(request, int(_MEMORY_SHARE * free) // page))

    # --- what a caller does ------------------------------------------------------------------------------------------

    @property
    def busy(self) -> bool:
        """Whether any request is unfinished."""
        return bool(self._live)

    def check(self, request: Request) -> None:
        """Raises UserError where `submit` would."""
        request.check(self.positions, self.model.vocab, len(self.stop_tokens))

    def submit(self, request: Request) -> None:
        """Queues a request; `step` tells of its tokens.

        Raises:
          UserError: it cannot be sampled here, or its id is that of another unfinished one.
        """
        self.check(request)
        if request.id in self._live:
            raise UserError(f"request {request.id} is there already; expected an id of its own")
        self._live[request.id] = self.schedule.add(request)

    def cancel(self, id_: str) -> None:
        """Forgets a request, wherever it is; no event tells of it. Nothing happens if it is finished."""
        if sequence := self._live.pop(id_, None):
            sequence.over = True
            self.schedule.leave(sequence)

    def step(self, *, fill: bool = False) -> list[Event]:
        """Dispatches prompt pieces and one decode call, then reads what was drawn before that call.

        So the devices work on one call while the host deals with the tokens of the last.

        Args:
          fill: read prompts until no slot is free, however long that keeps the others from their next tokens.
        """
        self._prefill(fill)
        events, call = self._decode()
        while self._pending:
            events += self._read(self._pending.popleft())
        if call:
            self._pending.append(call)
        return events

    def generate(self, requests: Iterable[Request]) -> Iterator[Output]:
        """Yields each request's output as it finishes, in order of finishing.

        Only whole outputs count here, so slots are filled first: a decode call costs the same with a few of them.

        Raises:
          UserError: a request cannot be sampled here; refused before anything is sampled.
        """
        requests = list(requests)
        for request in requests:
            self.check(request)
        said: dict[str, list[Event]] = {}
        try:
            for request in requests:
                self.submit(request)
                said[request.id] = []
            while said:
                for event in self.step(fill=True):
                    said[event.id].append(event)
                    if event.finish_reason:
                        yield _join(said.pop(event.id))
        finally:
            for id_ in said:  # the caller lost interest
                self.cancel(id_)

    # --- prompts -----------------------------------------------------------------------------------------------------

    def _prefill(self, fill: bool) -> None:
        """Reads prompts, one on each shard at a time, until a decode call is due."""
        calls = 0
        while fill or calls < self.config.prefill_calls or not any(s.decoding for s in self.schedule.running()):
            reading = {shard: s for shard, s in self._reading.items() if s.slot is not None and not s.decoding}
            for shard in range(self.shape.shards):
                if shard not in reading and (sequence := self.schedule.admit(shard)):
                    reading[shard] = sequence
            self._reading = reading
            if not reading:
                return
            self._read_pieces(reading)
            calls += 1

    def _read_pieces(self, sequences: dict[int, Sequence]) -> None:
        """Dispatches one piece of each context, by shard."""
        shards, length = self.shape.shards, self.config.prefill_tokens
        tokens, targets = np.zeros((2, shards, length), np.int32)
        start, count = np.zeros((2, shards), np.int32)
        tables = np.zeros((shards, self.shape.request_pages), np.int32)
        slot = np.full(shards, self.shape.shard_slots, np.int32)
        of_prompts = {}
        for row, sequence in sequences.items():
            assert sequence.slot is not None
            first = sequence.filled
            piece = sequence.context[first : first + length]
            tokens[row, : len(piece)], start[row], count[row] = piece, first, len(piece)
            tables[row] = self.schedule.tables[sequence.slot]
            self.schedule.read(sequence, len(piece))
            if sequence.filled == len(sequence.context):
                slot[row] = sequence.slot % self.shape.shard_slots
            following = sequence.request.prompt[first + 1 : first + length + 1]
            if sequence.request.prompt_logprobs and not sequence.said:
                targets[row, : len(following)] = following
                of_prompts[row] = sequence, following
        ending = {row: s for row, s in sequences.items() if s.filled == len(s.context)}
        features = transfer.features(ending.values())
        rows = transfer.slots(shards, ending, self.stop_tokens, self.model.vocab, features.penalties)
        piece = Piece(tokens, start, count, tables, slot, targets if of_prompts else None)
        self._cache, self._state, drawn, of_targets = programs.prefill(
            self.params,
            self._cache,
            self._state,
            *transfer.put((piece, rows)),
            c=self.model,
            dtype=self.dtype,
            features=features,
            kernel=self.config.attention,
        )
        members = [self._member(row, sequence, 1) for row, sequence in ending.items()]
        for sequence in ending.values():
            sequence.decoding = sequence.slot is not None
        self._pending.append(_Call(members, drawn, of_prompts, of_targets))

    # --- decoding ----------------------------------------------------------------------------------------------------

    def _decode(self) -> tuple[list[Event], _Call | None]:
        """Dispatches a decode call for whoever can go on; also what was read because pages ran out."""
        events: list[Event] = []
        most_steps = self.config.steps_per_call
        if not self.schedule.reserve(most_steps, preempt=False):
            while self._pending:
                events += self._read(self._pending.popleft())
            self.schedule.reserve(most_steps, preempt=True)
        going = [s for s in self.schedule.running() if s.decoding]
        if not going:
            return events, None
        steps = min(most_steps, max(s.left for s in going))
        keep = np.zeros(self.shape.slots, np.bool_)
        keep[[s.slot for s in going if s.slot is not None]] = True
        self._cache, self._state, drawn = programs.decode(
            self.params,
            self._cache,
            self._state,
            *transfer.put((self.schedule.tables.copy(), keep)),
            np.int32(steps),
            c=self.model,
            dtype=self.dtype,
            features=transfer.features(going),
            most_steps=most_steps,
            kernel=self.config.attention,
        )
        members = [self._member(s.slot, s, min(steps, s.left)) for s in going if s.slot is not None]
        return events, _Call(members, drawn, {}, None)

    def _member(self, row: int, sequence: Sequence, tokens: int) -> tuple[int, Sequence, int]:
        """Counts tokens that a call draws; a sequence that is sure to be at its limit then makes room at once."""
        sequence.ahead += tokens
        if not sequence.left:
            self.schedule.leave(sequence)
        return row, sequence, tokens

    # --- what was drawn ----------------------------------------------------------------------------------------------

    def _read(self, call: _Call) -> list[Event]:
        """Waits for a call, and tells what its members said."""
        for row, (sequence, following) in call.of_prompts.items():
            assert call.of_targets is not None
            at = (row, slice(len(following)))
            sequence.prompt_logprobs += transfer.logprobs(call.of_targets, following, at)
        tokens, events = np.asarray(call.drawn.tokens), []
        for row, sequence, most in call.members:
            sequence.ahead -= most
            if not sequence.over:
                new = tokens[tokens[:, row] >= 0, row].tolist()
                events.append(self._event(sequence, new, row, call.drawn.logprobs))
        return events

    def _event(self, sequence: Sequence, new: list[int], row: int, found: Logprobs | None) -> Event:
        request, first = sequence.request, not sequence.said
        sequence.said += new
        stopped = new[-1] in self.stop_tokens or new[-1] in request.stop_tokens
        if stopped or len(sequence.said) == sequence.limit:
            sequence.over = True
            self.schedule.leave(sequence)
            del self._live[request.id]
        if stopped:
            new = new[:-1]
        return Event(
            request.id,
            tuple(new),
            transfer.logprobs(found, new, (slice(len(new)), row)) if found is not None and request.logprobs else (),
            tuple(sequence.prompt_logprobs) if first else (),
            ("stop" if stopped else "length") if sequence.over else None,
        )


def _join(events: list[Event]) -> Output:
    """All that was told of one request."""
    tokens, logprobs, of_prompt = (
        tuple(itertools.chain(*parts))
        for parts in zip(*[(e.tokens, e.logprobs, e.prompt_logprobs) for e in events], strict=True)
    )
    reason = events[-1].finish_reason
    assert reason is not None
    return Output(events[-1].id, tokens, reason, logprobs, of_prompt)
