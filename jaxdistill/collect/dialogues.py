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
from collections.abc import Callable, Iterator
from typing import Literal

from jaxdistill.collect.calls import Call, Judged, judge_whole, read_whole
from jaxdistill.collect.outcomes import Outcomes
from jaxdistill.collect.prices import NANO
from jaxdistill.collect.prompting import COLLECT_PROMPTS, fill, prompt_id, read_prompt
from jaxdistill.collect.reply import Reply
from jaxdistill.collect.request import Failure, Request, Response
from jaxdistill.collect.sampling import Problems
from jaxdistill.records import Chain, Message, Problem, Usage
from jaxdistill.verify import Verifier

Method = Literal["journey", "debate"]
Requesting = Callable[[tuple[Message, ...], int, str], Request]  # messages, number of the turn, name of the prompts
_NUMBERED = 4  # tokens that one of an answer may be in a prompt: alone on its line, with the line's number before it
_STEP = re.compile(r"^\W*Step\W+(\d+|none)\W*$", re.IGNORECASE | re.MULTILINE)


class Dialogues:
    """One dialogue a problem: takes the place of `Sampling`. The same outcomes lead to the same calls."""

    def __init__(
        self,
        problems: Problems,
        method: Method,
        attempts: int,
        system: tuple[Message, ...],
        requesting: Requesting,
    ):
        self.problems = problems
        self._method, self._attempts, self._system, self._requesting = method, attempts, system, requesting
        self._review, self._revise = (
            read_prompt(f"{method}_{part}.v1", COLLECT_PROMPTS) for part in ("review", "revise")
        )
        self.prompt_text = "\n\n".join([*(m["content"] for m in system), self._review, self._revise])
        self.prompt_name = prompt_id(method, self.prompt_text)
        self._outcomes = Outcomes()  # the request that ended each dialogue, what became of it, and the thought
        self._turns: dict[int, list[tuple[Call, Judged]]] = collections.defaultdict(list)  # of those that go on
        self._replies: dict[str, Reply] = {}  # by id of the call

    @property
    def starts(self) -> int:
        """How many dialogues there are."""
        return len(self.problems)

    def at_worst(self, call: Call) -> Iterator[tuple[int, int]]:
        """Tokens of a dialogue's requests; each later prompt may hold the steps of all answers before it, numbered."""
        prompt, most = call.request.most_prompt_tokens, call.request.max_tokens
        words = max(len(part.encode()) for part in (self._review, self._revise))
        yield prompt, most
        for turn in range(1, 2 * self._attempts - 1):
            yield prompt + words + _NUMBERED * turn * most, most

    def start(self) -> Iterator[Call]:
        """The first attempts."""
        for number, problem in enumerate(self.problems):
            yield self._call(number, problem, 0, (*self._system, _user(problem.problem)))

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

    def judged(self, call: Call, judged: Judged) -> tuple[bool, list[Call]]:
        """Takes what became of a call; returns whether its dialogue is over, and its next call."""
        self._outcomes.pay(call.key, judged.nano)
        turns = self._turns[call.number]
        turns.append((call, judged))
        if message := self._next(call.problem, turns):
            return False, [self._call(call.number, call.problem, len(turns), (message,))]
        last, end = _end(turns)
        thought = self._follow(turns)[0] if end.reason is None and len(turns) > 1 else None
        self._outcomes.put(call.number, 0, (last.request, end, thought))
        for turn, _ in self._turns.pop(call.number):
            self._replies.pop(turn.id, None)
        return True, []

    def in_order(self) -> Iterator[tuple[Call, Judged]]:
        """How each dialogue ended: its last attempt, or the call that broke it off, with the usage of all."""
        for number, problem in enumerate(self.problems):
            for _, (request, judged, _) in self._outcomes.of(number):
                yield Call(problem, request, request.key, number), judged

    def paid(self) -> int:
        """What all calls cost, in billionths of a dollar."""
        return self._outcomes.paid()

    def told(self, call: Call, judged: Judged, chain: Chain) -> Chain:
        """The chain of a last attempt with the whole dialogue as its thought."""
        ((_, (_, _, thought)),) = self._outcomes.of(call.number)
        if thought is None:
            return chain
        question = (*self._system, _user(call.problem.problem))
        answer = {"role": "assistant", "content": chain.messages[-1]["content"], "reasoning_content": thought}
        return dataclasses.replace(
            chain,
            messages=(*question, answer),
            reasoning_kind="synthesized",
            usage=judged.usage,
            cost_usd=judged.nano / NANO,
        )

    def _call(self, number: int, problem: Problem, turn: int, messages: tuple[Message, ...]) -> Call:
        request = self._requesting(messages, turn, self.prompt_name)
        return Call(problem, request, request.key, number)

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
