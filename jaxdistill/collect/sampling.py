"""Which calls to make: n for each problem, or until m are verified of at most n; a larger try where one was cut off."""

import dataclasses
import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import Protocol, runtime_checkable

from jaxdistill.collect.calls import Call, Judged, judge
from jaxdistill.collect.outcomes import Outcomes
from jaxdistill.collect.request import Failure, Request, Response
from jaxdistill.records import Problem
from jaxdistill.verify import Verifier

Asking = Callable[[Problem, int, int | None], Request]  # problem, sample index, max_tokens (None: the usual limit)
Judging = Callable[[Call, Response | Failure, Verifier], Judged]


@runtime_checkable
class Problems(Protocol):
    """Problems that can be gone through again, each time the same: a list, or rows of a file."""

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[Problem]: ...


@runtime_checkable
class Plan(Protocol):
    """Which calls a campaign makes, and what they come to: `Sampling`, or `Dialogues`."""

    judge: Judging

    def start(self) -> Iterable[Call]:
        """The first calls, made as they are asked for."""
        ...

    @property
    def starts(self) -> int:
        """How many these are."""
        ...

    def at_worst(self, call: Call) -> Iterator[tuple[int, int]]:
        """Prompt and output tokens, at most, of each request that may be made because of a first call, it included."""
        ...

    def judged(self, call: Call, judged: Judged) -> tuple[bool, list[Call]]:
        """Takes what became of a call; returns whether it is a result, and the calls to make because of it."""
        ...

    def in_order(self) -> Iterator[tuple[Call, Judged]]:
        """All results by problem and sample."""
        ...


@dataclasses.dataclass
class _Progress:
    """The samples of a problem that is not done with."""

    planned: int = 0
    judged: int = 0
    verified: int = 0


class Sampling:
    """The calls of one run and what became of them. The same outcomes lead to the same calls, in whatever order.

    Memory: of the problems that are under way a few numbers.
    """

    def __init__(
        self,
        problems: Problems,
        asking: Asking,
        samples: int,
        until_verified: int | None = None,
        larger_max_tokens: int | None = None,
        judging: Judging = judge,
    ):
        self.problems, self.judge = problems, judging
        self._asking, self._samples, self._until, self._larger = asking, samples, until_verified, larger_max_tokens
        self._outcomes = Outcomes()
        self._under_way: dict[int, _Progress] = {}  # by number of the problem

    def start(self) -> Iterator[Call]:
        """The first calls, made as they are asked for."""
        for number, problem in enumerate(self.problems):
            self._under_way[number] = _Progress()
            yield from self._more(number, problem)

    @property
    def starts(self) -> int:
        """How many these are."""
        return len(self.problems) * (self._until or self._samples)

    def at_worst(self, call: Call) -> Iterator[tuple[int, int]]:
        """Tokens of the call and of its larger try; with a problem's first call, of all samples that may follow."""
        prompt, follow = call.request.most_prompt_tokens, self._samples - (self._until or self._samples)
        for _ in range(1 + (follow if call.request.sample_index == 0 else 0)):
            yield prompt, call.request.max_tokens
            if self._larger:
                yield prompt, self._larger

    def judged(self, call: Call, judged: Judged) -> tuple[bool, list[Call]]:
        """Takes what became of a call; returns whether it is a result, and the calls to make because of it."""
        self._outcomes.pay(call.key, judged.nano)
        larger = call.request.max_tokens == self._larger
        if judged.reason == "truncated" and self._larger and not larger:
            return False, [self._call(call.number, call.problem, call.request.sample_index, self._larger)]
        self.put(call, judged)
        progress = self._under_way[call.number]
        progress.judged += 1
        progress.verified += judged.reason is None
        return True, self._more(call.number, call.problem)

    def put(self, call: Call, judged: Judged) -> None:
        """Keeps a result in place of an earlier one."""
        limit = call.request.max_tokens if call.request.max_tokens == self._larger else None
        self._outcomes.put(call.number, call.request.sample_index, (limit, judged))

    def _more(self, number: int, problem: Problem) -> list[Call]:
        progress = self._under_way[number]
        wanted, planned = self._samples, progress.planned
        if self._until is not None:
            wanted = planned - progress.judged + progress.verified  # if all that are out are right
            wanted = planned + max(0, self._until - wanted)
        last = min(wanted, self._samples)
        progress.planned = max(planned, last)
        if progress.judged == progress.planned:
            del self._under_way[number]
        return [self._call(number, problem, index, None) for index in range(planned, last)]

    def _call(self, number: int, problem: Problem, sample_index: int, max_tokens: int | None) -> Call:
        request = self._asking(problem, sample_index, max_tokens)
        return Call(problem, request, request.key, number)

    def by_problem(self) -> Iterator[tuple[Problem, list[tuple[Call, Judged]]]]:
        """Every problem, with what there is of its results by sample."""
        for number, problem in enumerate(self.problems):
            yield (
                problem,
                [
                    (self._call(number, problem, sample, limit), judged)
                    for sample, (limit, judged) in self._outcomes.of(number)
                ],
            )

    def in_order(self) -> Iterator[tuple[Call, Judged]]:
        """All results by problem and sample."""
        return itertools.chain.from_iterable(results for _, results in self.by_problem())

    def paid(self) -> int:
        """What all calls cost, in billionths of a dollar: problems of equal words are one, and paid for once."""
        return self._outcomes.paid()
