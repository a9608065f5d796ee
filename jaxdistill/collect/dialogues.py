"""Long thought out of several calls a problem: a search that goes back (journey), a policy and a critic (debate).

Both alternate attempts, which solve the problem, and reviews, which name the first wrong step of an attempt:

- `journey`: the gold answer judges an attempt. A wrong one is a branch of a tree: the review finds where it went wrong,
  and the next attempt goes on from the last right step, depth first, until a branch verifies.
- `debate`: the critic judges an attempt without knowing the answer, and the policy answers its objection with another
  whole solution, until the critic finds no wrong step.

The chain tells it all as one thought: wrong steps, what was noticed, and how it went on. Its answer is verified as
every other.
"""

import collections
import dataclasses
import re
from collections.abc import Callable, Iterable, Iterator
from typing import Literal

from jaxdistill.collect.calls import Call, Judged, judge_whole, read_whole
from jaxdistill.collect.prices import NANO
from jaxdistill.collect.prompting import COLLECT_PROMPTS, fill, prompt_id, read_prompt
from jaxdistill.collect.reply import Reply
from jaxdistill.collect.request import Failure, Request, Response
from jaxdistill.records import Chain, Message, Problem, Usage
from jaxdistill.verify import Verifier

Method = Literal["journey", "debate"]
Requesting = Callable[[tuple[Message, ...], int, str], Request]  # messages, number of the turn, name of the prompts
_STEP = re.compile(r"^\W*Step\W+(\d+|none)\W*$", re.IGNORECASE | re.MULTILINE)


class Dialogues:
    """One dialogue a problem: takes the place of `Sampling`. The same outcomes lead to the same calls."""

    def __init__(
        self,
        problems: Iterable[Problem],
        method: Method,
        attempts: int,
        system: tuple[Message, ...],
        requesting: Requesting,
    ):
        self.problems = list(problems)
        self._method, self._attempts, self._system, self._requesting = method, attempts, system, requesting
        self._review, self._revise = (
            read_prompt(f"{method}_{part}.v1", COLLECT_PROMPTS) for part in ("review", "revise")
        )
        self.prompt_text = "\n\n".join([*(m["content"] for m in system), self._review, self._revise])
        self.prompt_name = prompt_id(method, self.prompt_text)
        self.results: dict[str, tuple[Call, Judged]] = {}  # by id of the last call
        self.nano: dict[str, int] = {}  # cost by request
        self._turns: dict[str, list[tuple[Call, Judged]]] = collections.defaultdict(list)  # by id of the problem
        self._ends: dict[str, tuple[Call, Judged]] = {}
        self._replies: dict[str, Reply] = {}  # by id of the call

    @property
    def most(self) -> int:
        """Calls at most."""
        return len(self.problems) * (2 * self._attempts - 1)

    def start(self) -> list[Call]:
        """The first attempts."""
        return [self._call(problem, 0, (*self._system, _user(problem.problem))) for problem in self.problems]

    def judge(self, call: Call, outcome: Response | Failure, verifier: Verifier) -> Judged:
        """Whether an attempt is whole and right, or a review whole and to the point."""
        reply, whole = read_whole(outcome)
        if reply is None:
            return whole
        self._replies[call.id] = reply
        if not _is_review(call):
            return judge_whole(call, reply, whole, verifier)
        step = _named_step(reply)
        if step is None or (step == 0 and self._method == "journey"):
            return dataclasses.replace(whole, reason="failed", detail="the review names no wrong step")
        return whole

    def judged(self, call: Call, judged: Judged) -> list[Call]:
        """Takes what became of a call; returns the next one of its dialogue."""
        self.nano[call.key] = judged.nano
        turns = self._turns[call.problem.id]
        turns.append((call, judged))
        if message := self._next(call.problem, turns):
            return [self._call(call.problem, len(turns), (message,))]
        self.results[call.id] = self._ends[call.problem.id] = _end(turns)
        return []

    def in_order(self) -> Iterator[tuple[Call, Judged]]:
        """How each dialogue ended: its last attempt, or the call that broke it off, with the usage of all."""
        return (self._ends[problem.id] for problem in self.problems if problem.id in self._ends)

    def told(self, chain: Chain) -> Chain:
        """The chain of a last attempt with the whole dialogue as its thought."""
        turns = self._turns[chain.problem_id]
        if len(turns) == 1:
            return chain
        thought, _ = self._follow(turns)
        question = (*self._system, _user(turns[0][0].problem.problem))
        answer = {"role": "assistant", "content": chain.messages[-1]["content"], "reasoning_content": thought}
        return dataclasses.replace(
            chain,
            messages=(*question, answer),
            reasoning_kind="synthesized",
            usage=_total([judged.usage for _, judged in turns]),
            cost_usd=sum(judged.nano for _, judged in turns) / NANO,
        )

    def _call(self, problem: Problem, turn: int, messages: tuple[Message, ...]) -> Call:
        request = self._requesting(messages, turn, self.prompt_name)
        return Call(problem, request, request.key)

    def _next(self, problem: Problem, turns: list[tuple[Call, Judged]]) -> Message | None:
        """What to ask after these turns, None where the dialogue is over."""
        call, judged = turns[-1]
        if call.id not in self._replies:
            return None
        values = {"problem": problem.problem, "steps": _numbered(self._follow(turns)[1])}
        if not _is_review(call):
            right = self._method == "journey" and judged.reason is None
            return None if right or len(turns) == 2 * self._attempts - 1 else _user(fill(self._review, values))
        review = self._replies[call.id]
        if judged.reason is not None or _named_step(review) == 0:
            return None
        return _user(fill(self._revise, {**values, "review": _words(review)}))

    def _follow(self, turns: list[tuple[Call, Judged]]) -> tuple[str, list[str]]:
        """The thought that the turns tell, and the steps that stand after them."""
        told: list[str] = []
        steps: list[str] = []
        shown = 0  # of the steps
        for call, _ in turns:
            reply = self._replies[call.id]
            if not _is_review(call):
                kept = steps if self._method == "journey" else []
                steps, shown = [*kept, *_lines(reply)], len(kept)
                continue
            step = min(_named_step(reply) or len(steps), len(steps))
            until = step if self._method == "journey" else len(steps)  # a branch is left at its wrong step
            told += ["\n".join(steps[shown:until]), _words(reply)]
            steps, shown = (steps[: step - 1] if self._method == "journey" else steps), len(steps)
        last = self._replies[turns[-1][0].id]
        if not _is_review(turns[-1][0]) and last.reasoning is not None:  # else the steps are its content
            told.append("\n".join(steps[shown:]))
        return "\n\n".join(filter(None, told)), steps


def _is_review(call: Call) -> bool:
    return call.request.sample_index % 2 == 1


def _user(content: str) -> Message:
    return {"role": "user", "content": content}


def _lines(reply: Reply) -> list[str]:
    text = reply.content if reply.reasoning is None else reply.reasoning
    return [line.strip() for line in text.splitlines() if line.strip()]


def _numbered(steps: list[str]) -> str:
    return "\n".join(f"{number}. {step}" for number, step in enumerate(steps, start=1))


def _named_step(review: Reply) -> int | None:
    """The first wrong step by a review's last line `Step: N`; 0 for `Step: none`, None without such a line."""
    named = _STEP.findall(review.content)
    return None if not named else int(named[-1]) if named[-1].isdigit() else 0


def _words(review: Reply) -> str:
    """What a review says, without the line that names the step."""
    return _STEP.sub("", review.content).strip()


def _end(turns: list[tuple[Call, Judged]]) -> tuple[Call, Judged]:
    """The last attempt of a dialogue, or the call that broke it off, with what all of it used."""
    accepted = _is_review(turns[-1][0]) and turns[-1][1].reason is None
    call, judged = turns[-2] if accepted else turns[-1]
    nano = sum(one.nano for _, one in turns)
    return call, dataclasses.replace(judged, usage=_total([one.usage for _, one in turns]), nano=nano)


def _total(usages: list[Usage]) -> Usage:
    names = [field.name for field in dataclasses.fields(Usage)]
    return Usage(**{name: sum(getattr(usage, name) for usage in usages) for name in names})
