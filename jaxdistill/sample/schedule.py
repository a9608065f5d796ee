"""Who decodes, who waits, and who gives way when pages run out; numbers only, no device."""

import collections
import dataclasses

import numpy as np

from jaxdistill.errors import UserError
from jaxdistill.sample.pages import Pool, prompt_keys
from jaxdistill.sample.request import Logprob, Request


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shape:
    """The room that an engine has."""

    slots: int  # requests decoded at once, on all devices together
    positions: int  # longest prompt and output together, in tokens
    page_tokens: int  # positions of a page
    pages: int  # on each shard
    shards: int = 1  # devices, or groups of them, that split the slots

    def __post_init__(self):
        assert self.slots % self.shards == 0
        if self.pages < self.request_pages:
            raise UserError(
                f"the cache has {self.pages} pages of {self.page_tokens} positions on each device; expected at least "
                f"{self.request_pages}, so that one request of {self.positions} positions fits; "
                "give the cache more positions, or requests fewer"
            )

    @property
    def request_pages(self) -> int:
        """Pages of the longest request."""
        return -(-self.positions // self.page_tokens)

    @property
    def spare_pages(self) -> int:
        """Pages that stay free for each running request when another one comes.

        On answers of 1k to 32k tokens (benchmarks/concurrency.py, the smallest cache) a single page had preempted
        requests read again 61% as many tokens as were said, this many 13%, at a concurrency 5% lower.
        """
        return max(1, self.request_pages // 32)

    @property
    def shard_slots(self) -> int:
        return self.slots // self.shards


@dataclasses.dataclass(eq=False)
class Sequence:
    """A request on its way. Tokens that are still on the devices count in `ahead` until they are read."""

    request: Request
    limit: int  # output tokens
    arrival: int  # number in the order of arrival
    keys: list[bytes]  # of the prompt's whole pages
    said: list[int] = dataclasses.field(default_factory=list)  # output, the stop token included
    prompt_logprobs: list[Logprob] = dataclasses.field(default_factory=list)  # as far as they are read
    ahead: int = 0  # most output tokens that dispatched calls may add
    slot: int | None = None
    pages: list[int] = dataclasses.field(default_factory=list)
    filled: int = 0  # tokens whose keys and values are in the pages, once all that is dispatched has run
    decoding: bool = False  # the whole context is read, or a dispatched call reads it
    over: bool = False  # finished or cancelled

    @property
    def context(self) -> tuple[int, ...]:
        """What is read before the next token can be drawn: after a preemption also what had been said."""
        return (*self.request.prompt, *self.said)

    @property
    def left(self) -> int:
        """Output tokens that no dispatched call may add."""
        return self.limit - len(self.said) - self.ahead


class Scheduler:
    """Requests in slots and pages. First come, first served; who came last gives way."""

    def __init__(self, shape: Shape):
        self.shape = shape
        self.waiting: collections.deque[Sequence] = collections.deque()
        self.slots: list[Sequence | None] = [None] * shape.slots
        self.pools = [Pool(shape.pages, shape.page_tokens) for _ in range(shape.shards)]
        self.tables = np.zeros((shape.slots, shape.request_pages), np.int32)
        self.preemptions = 0
        self._arrivals = 0

    def add(self, request: Request) -> Sequence:
        """Queues a request."""
        limit = min(request.sampling.max_new_tokens, self.shape.positions - len(request.prompt))
        keys = prompt_keys(request.prompt, self.shape.page_tokens)
        sequence = Sequence(request, limit, self._arrivals, keys)
        self._arrivals += 1
        self.waiting.append(sequence)
        return sequence

    def running(self, shard: int | None = None) -> list[Sequence]:
        """Sequences that hold a slot, oldest first."""
        size = self.shape.shard_slots
        slots = self.slots if shard is None else self.slots[shard * size : (shard + 1) * size]
        return sorted((s for s in slots if s is not None), key=lambda s: s.arrival)

    def admit(self, shard: int) -> Sequence | None:
        """Gives the first in the queue a slot of this shard and pages for its context, if there are both.

        Each request that runs there already keeps some pages to grow into, lest the newcomer be preempted soon; no more
        than it may still need.
        """
        first = shard * self.shape.shard_slots
        free = next((i for i in range(first, first + self.shape.shard_slots) if self.slots[i] is None), None)
        if not self.waiting or free is None:
            return None
        sequence, pool = self.waiting[0], self.pools[shard]
        context = sequence.context
        # At least one token is read, for the logits after it; prompt log-probabilities need them all
        sharable = 0 if sequence.request.prompt_logprobs else (len(context) - 1) // self.shape.page_tokens
        shared = pool.share(sequence.keys[:sharable])
        needed = self._pages(len(context)) - len(shared)
        kept = sum(
            min(self.shape.spare_pages, self._pages_after(s, s.limit) - len(s.pages)) for s in self.running(shard)
        )
        own = pool.take(needed) if needed + kept <= pool.available else None
        if own is None:
            pool.release(shared)
            return None
        self.waiting.popleft()
        self.slots[free] = sequence
        sequence.slot, sequence.filled = free, len(shared) * self.shape.page_tokens
        self._append(sequence, shared + own)
        return sequence

    def read(self, sequence: Sequence, tokens: int) -> None:
        """Counts context tokens that a dispatched call reads; whole prompt pages can be shared from now on."""
        before = sequence.filled
        sequence.filled += tokens
        size, pool = self.shape.page_tokens, self._pool(sequence)
        for page in range(before // size, min(sequence.filled // size, len(sequence.keys))):
            pool.publish(sequence.keys[page], sequence.pages[page])

    def reserve(self, steps: int, preempt: bool) -> bool:
        """Gives every decoding request the pages that its next steps may fill, the oldest first.

        Args:
          preempt: where pages run out, let the youngest request of the shard give its own back and wait again. No
            call may be under way: what it produced would be lost.

        Returns:
          Whether all have what they need; without `preempt` some may not.
        """
        for sequence in [s for s in self.running() if s.decoding]:
            if sequence.slot is None:
                continue  # preempted for the sake of an older one
            while (own := self._pool(sequence).take(self._missing(sequence, steps))) is None:
                if not preempt:
                    return False
                youngest = self.running(sequence.slot // self.shape.shard_slots)[-1]
                self._preempt(youngest)
                if youngest is sequence:
                    break
            else:
                self._append(sequence, own)
        return True

    def leave(self, sequence: Sequence) -> None:
        """Takes slot and pages back: calls already dispatched run before any that gets them next."""
        if sequence.slot is None:
            if sequence in self.waiting:
                self.waiting.remove(sequence)
            return
        self._pool(sequence).release(sequence.pages)
        self.slots[sequence.slot] = None
        sequence.slot, sequence.pages, sequence.decoding = None, [], False

    def _preempt(self, sequence: Sequence) -> None:
        assert sequence.ahead == 0
        self.leave(sequence)
        sequence.filled, sequence.prompt_logprobs = 0, []
        self.waiting.appendleft(sequence)
        self.preemptions += 1

    def _pool(self, sequence: Sequence) -> Pool:
        assert sequence.slot is not None
        return self.pools[sequence.slot // self.shape.shard_slots]

    def _pages(self, positions: int) -> int:
        return -(-positions // self.shape.page_tokens)

    def _missing(self, sequence: Sequence, steps: int) -> int:
        produced = min(len(sequence.said) + sequence.ahead + steps, sequence.limit)
        return max(0, self._pages_after(sequence, produced) - len(sequence.pages))

    def _pages_after(self, sequence: Sequence, produced: int) -> int:
        """Pages that a request holds once it said so many tokens: the last one takes no position, the others do."""
        return self._pages(len(sequence.request.prompt) + produced - 1)

    def _append(self, sequence: Sequence, pages: list[int]) -> None:
        have = len(sequence.pages)
        sequence.pages += pages
        self.tables[sequence.slot, have : len(sequence.pages)] = pages
