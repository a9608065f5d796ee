"""Budget forcing: thinking that is ended at a limit and asked for its answer, or sent on by "Wait" where it would end.

The way of s1 (Muennighoff et al., arXiv 2501.19393), token by token, so that what is forced does not depend on how the
engine groups its steps. A sample that needs no forcing says what it says without a budget.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

from jaxdistill import thinking
from jaxdistill.errors import UserError
from jaxdistill.sample.engine import Engine
from jaxdistill.sample.request import Event, FinishReason, Output, Request, derived_seed
from jaxdistill.sample.text import TextStream

CLOSING = f"\n{thinking.CLOSE}\nFinal Answer:"
WAIT = "\nWait"
_TAG_TOKENS = 32  # more than a closing tag has


@dataclasses.dataclass(frozen=True, kw_only=True)
class Budget:
    """How long a model thinks; by default as long as it likes."""

    thinking_tokens: int | None = None  # thinking that reaches so many is ended, and the answer asked for
    waits: int = 0  # times that thinking goes on where the model would end it

    @property
    def free(self) -> bool:
        """Whether nothing is forced."""
        return self == Budget()

    @property
    def name(self) -> str:
        """For a folder; empty where nothing is forced."""
        if self.waits:
            return f"wait{self.waits}"
        return "" if self.thinking_tokens is None else f"think{self.thinking_tokens}"

    def settings(self) -> dict[str, Any]:
        """What of it makes a completion; nothing where nothing is forced."""
        if self.free:
            return {}
        return {**dataclasses.asdict(self), "wait" if self.waits else "closing": WAIT if self.waits else CLOSING}


@dataclasses.dataclass(eq=False)
class _Sample:
    """One answer on its way through stages, each a request of its own; a stage goes on from all that is kept."""

    request: Request
    waits: int  # left
    stream: TextStream
    splitter: thinking.Splitter
    kept: list[int] = dataclasses.field(default_factory=list)  # tokens, those that were forced included
    stage: int = 0

    @property
    def left(self) -> int:
        """Tokens that may still come."""
        return self.request.sampling.max_new_tokens - len(self.kept)

    def next_request(self) -> Request:
        """Of this stage; its noise is another one's, a function of seed and stage."""
        seed = derived_seed(self.request.seed, self.stage) if self.stage else self.request.seed
        sampling = dataclasses.replace(self.request.sampling, max_new_tokens=self.left)
        prompt = (*self.request.prompt, *self.kept)
        return dataclasses.replace(
            self.request, id=f"{self.request.id}#{self.stage}", prompt=prompt, seed=seed, sampling=sampling
        )


def generate(engine: Engine, requests: Sequence[Request], budget: Budget, tokenizer: Any) -> Iterator[Output]:
    """Yields each request's output as it finishes, forced tokens among its own; `Engine.generate` with a budget.

    A stage reads prompt and earlier tokens again, which is what forcing costs beside the tokens themselves.

    Raises:
      UserError: a request cannot be sampled here, or its limit leaves no room for an answer after the thinking.
    """
    if budget.free:
        yield from engine.generate(requests)
        return
    closing, wait = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in (CLOSING, WAIT))
    samples: dict[str, _Sample] = {}  # by id of the stage's request
    for request in requests:
        engine.check(request)
        _check_room(request, budget, len(closing))
    for request in requests:
        opened = tokenizer.decode(request.prompt[-_TAG_TOKENS:]).rstrip().endswith(thinking.OPEN)
        sample = _Sample(request, budget.waits, TextStream(tokenizer), thinking.Splitter(opened))
        engine.submit(sample.next_request())
        samples[f"{request.id}#0"] = sample

    def go_on(id_: str, sample: _Sample, forced: list[int]) -> None:
        """From the tokens kept and these, in another stage."""
        engine.cancel(id_)
        del samples[id_]  # what else it said in this step is dropped
        sample.kept += forced
        sample.stage += 1
        request = sample.next_request()
        engine.submit(request)
        samples[request.id] = sample

    try:
        while samples:
            for event in engine.step(fill=True):
                sample = samples.get(event.id)
                if sample is None:
                    continue
                forced = _take(sample, event, budget, closing, wait, tokenizer)
                if forced is not None:
                    go_on(event.id, sample, forced)
                elif event.finish_reason:
                    del samples[event.id]
                    yield _output(sample, event.finish_reason)
    finally:
        for id_ in samples:  # the caller lost interest
            engine.cancel(id_)


def _check_room(request: Request, budget: Budget, closing: int) -> None:
    limit = request.sampling.max_new_tokens
    if budget.thinking_tokens is not None and budget.thinking_tokens + closing >= limit:
        raise UserError(
            f"thinking is to be ended at {budget.thinking_tokens} tokens, but sampling.max_new_tokens is {limit}: "
            f"{closing} more close it and ask, and the answer needs some; raise max_new_tokens"
        )


def _take(
    sample: _Sample, event: Event, budget: Budget, closing: list[int], wait: list[int], tokenizer: Any
) -> list[int] | None:
    """Keeps an event's tokens; what to force after those that are kept, None where nothing is."""
    for token in event.tokens:
        sample.kept.append(token)
        if sample.splitter.thinking is False:
            continue  # the answer is nobody's to force
        sample.splitter.add(sample.stream.add([token]))
        closed = sample.splitter.thinking is False and _ends_thinking(sample.kept, tokenizer)
        if closed and sample.waits:
            thought = without_tag(sample.kept, tokenizer)
            if len(thought) + len(wait) < sample.request.sampling.max_new_tokens:
                sample.kept = thought
                return _wait(sample, wait)
        if sample.splitter.thinking and len(sample.kept) == budget.thinking_tokens:
            sample.splitter.thinking = False
            return closing
    stopped = event.finish_reason == "stop" and sample.splitter.thinking
    return _wait(sample, wait) if stopped and sample.waits and sample.left > len(wait) else None


def _wait(sample: _Sample, wait: list[int]) -> list[int]:
    """Thinking goes on after these."""
    sample.waits -= 1
    sample.splitter = thinking.Splitter(opened=True)
    return wait


def _ends_thinking(tokens: list[int], tokenizer: Any) -> bool:
    """Whether a closing tag was just completed; without one the answer began without any thought."""
    return thinking.CLOSE in tokenizer.decode(tokens[-_TAG_TOKENS:])


def without_tag(tokens: Sequence[int], tokenizer: Any) -> list[int]:
    """Tokens without those of the closing tag at their end, also where it shares a token with what is before it."""
    left = list(tokens[:-1])
    while left:
        end = tokenizer.decode(left[-_TAG_TOKENS:])
        if not any(end.endswith(thinking.CLOSE[:n]) for n in range(1, len(thinking.CLOSE))):
            break
        left.pop()
    return left


def _output(sample: _Sample, reason: FinishReason) -> Output:
    return Output(sample.request.id, tuple(sample.kept), reason)
