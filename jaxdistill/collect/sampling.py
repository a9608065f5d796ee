"""Which calls to make: n for each problem, or until m are verified of at most n; a larger try where one was cut off."""

import collections
from collections.abc import Callable, Iterable, Iterator
from typing import Protocol, runtime_checkable

from jaxdistill.collect.calls import Call, Judged, judge
from jaxdistill.collect.request import Failure, Request, Response
from jaxdistill.records import Problem
from jaxdistill.verify import Verifier

Asking = Callable[[Problem, int, int | None], Request]  # problem, sample index, max_tokens (None: the usual limit)
Judging = Callable[[Call, Response | Failure, Verifier], Judged]


@runtime_checkable
class Plan(Protocol):
    """Which calls a campaign makes, and what they come to: `Sampling`, or `Dialogues`."""

    judge: Judging
    results: dict[str, tuple[Call, Judged]]
    nano: dict[str, int]

    def start(self) -> list[Call]:
        """The first calls."""
        ...

    @property
    def most(self) -> int:
        """Calls at most, larger tries aside."""
        ...

    def judged(self, call: Call, judged: Judged) -> list[Call]:
        """Takes what became of a call; returns the calls to make because of it."""
        ...

    def in_order(self) -> Iterator[tuple[Call, Judged]]:
        """All results by problem and sample."""
        ...


class Sampling:
    """The calls of one run and what became of them. The same outcomes lead to the same calls, in whatever order."""

    def __init__(
        self,
        problems: Iterable[Problem],
        asking: Asking,
        samples: int,
        until_verified: int | None = None,
        larger_max_tokens: int | None = None,
        judging: Judging = judge,
    ):
        self.problems, self.judge = list(problems), judging
        self._asking, self._samples, self._until, self._larger = asking, samples, until_verified, larger_max_tokens
        self.results: dict[str, tuple[Call, Judged]] = {}  # by id of the call; the last call of a sample
        self.nano: dict[str, int] = {}  # cost by request: problems of equal words are one, and paid for once
        self._planned: collections.Counter[str] = collections.Counter()  # samples by id of the problem
        self._verified: collections.Counter[str] = collections.Counter()
        self._judged: collections.Counter[str] = collections.Counter()

    def start(self) -> list[Call]:
        """The first calls."""
        return [call for problem in self.problems for call in self._more(problem)]

    @property
    def most(self) -> int:
        """Calls at most, larger tries aside."""
        return len(self.problems) * self._samples

    def judged(self, call: Call, judged: Judged) -> list[Call]:
        """Takes what became of a call; returns the calls to make because of it."""
        self.nano[call.key] = judged.nano
        if judged.reason == "truncated" and self._larger and call.request.max_tokens < self._larger:
            return [self._call(call.problem, call.request.sample_index, self._larger)]
        self.results[call.id] = (call, judged)
        self._judged[call.problem.id] += 1
        self._verified[call.problem.id] += judged.reason is None
        return self._more(call.problem)

    def _more(self, problem: Problem) -> list[Call]:
        planned = self._planned[problem.id]
        wanted = self._samples
        if self._until is not None:
            wanted = planned - self._judged[problem.id] + self._verified[problem.id]  # if all that are out are right
            wanted = planned + max(0, self._until - wanted)
        last = min(wanted, self._samples)
        self._planned[problem.id] = max(planned, last)
        return [self._call(problem, index, None) for index in range(planned, last)]

    def _call(self, problem: Problem, sample_index: int, max_tokens: int | None) -> Call:
        request = self._asking(problem, sample_index, max_tokens)
        return Call(problem, request, request.key)

    def in_order(self) -> Iterator[tuple[Call, Judged]]:
        """All results by problem and sample."""
        for problem in self.problems:
            for index in range(self._planned[problem.id]):
                if (result := self.results.get(f"{problem.id}/{index}")) is not None:
                    yield result


def pass_rates(results: Iterable[tuple[Call, Judged]]) -> dict[str, tuple[int, int]]:
    """(verified, judged) results by problem; one without an answer yet does not count."""
    rates: dict[str, tuple[int, int]] = {}
    for call, judged in results:
        verified, asked = rates.get(call.problem.id, (0, 0))
        rates[call.problem.id] = (verified + (judged.reason is None), asked + (not judged.again))
    return rates
