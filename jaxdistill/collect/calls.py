"""Planned calls, what became of each, and the receipts for those that gave no chain."""

import dataclasses
from typing import Literal

from jaxdistill.collect.reply import Reply, UnreadableReply, read_reply
from jaxdistill.collect.request import Failure, Request, Response
from jaxdistill.reading import Dropped
from jaxdistill.records import Problem, Usage, Verdict
from jaxdistill.verify import Verifier, boxed_answers, extract_answer

Reason = Literal[
    # of a line of the input
    "malformed",
    # of any answer
    "wrong",
    "truncated",
    "unverifiable",
    "failed",
    # of a rewrite or a translation
    "not_longer",
    "answer_changed",
    "numbers_changed",
    "latex_changed",
    "box_changed",
    "code_changed",
    "wrong_language",
    # of a judgement
    "unreadable",
]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Receipt:
    """Why something was dropped."""

    id: str  # of the chain that is missing
    problem_id: str
    reason: Reason
    detail: str
    request_key: str = ""  # in the ledger, which holds the raw answer; empty where nothing was asked
    usage: Usage = Usage()  # what it cost all the same


def malformed_line(row: Dropped) -> Receipt:
    """The receipt of a line that holds no row."""
    return Receipt(id=row.id, problem_id="", reason="malformed", detail=row.detail)


@dataclasses.dataclass(frozen=True)
class Call:
    """One planned call: `id` is problem id / sample index."""

    problem: Problem
    request: Request
    key: str
    number: int = 0  # of the problem, in the order of the input

    @property
    def id(self) -> str:
        """Id of the chain it may become."""
        return f"{self.problem.id}/{self.request.sample_index}"

    def receipt(self, reason: Reason, detail: str, usage: Usage) -> Receipt:
        """The receipt if it becomes none."""
        names = {"id": self.id, "problem_id": self.problem.id, "request_key": self.key}
        return Receipt(**names, reason=reason, detail=detail, usage=usage)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Judged:
    """What became of a call; the text stays in the ledger."""

    reason: Reason | None  # None: verified
    detail: str = ""
    usage: Usage = Usage()
    nano: int = 0  # cost in billionths of a dollar
    verdict: Verdict | None = None
    flags: tuple[str, ...] = ()
    again: bool = False  # it has no answer yet: the next run asks again


def judge(call: Call, outcome: Response | Failure, verifier: Verifier) -> Judged:
    """Whether an answer is whole and right, or what is wrong with it."""
    reply, whole = read_whole(outcome)
    return whole if reply is None else judge_whole(call, reply, whole, verifier)


def judge_whole(call: Call, reply: Reply, whole: Judged, verifier: Verifier) -> Judged:
    """What `read_whole` found, with whether the answer is right."""
    assert call.problem.answer is not None
    verdict = verifier.verify(reply.text, call.problem.answer)
    flags = ("two_answers",) if boxes_differ(reply.text, verifier) else ()
    found = dataclasses.replace(whole, verdict=verdict, flags=flags)
    if verdict.label == "correct":
        return found
    detail = f"rule {verdict.rule}: found {verdict.extracted!r}, gold answer {call.problem.answer!r}"
    return dataclasses.replace(found, reason=verdict.label, detail=detail)


def read_whole(outcome: Response | Failure) -> tuple[Reply | None, Judged]:
    """The reply of an answer that is whole, with what it cost; None and what is wrong with it of any other."""
    if isinstance(outcome, Failure):
        return None, Judged(reason="failed", detail=outcome.detail, again=not outcome.permanent)
    try:
        reply = read_reply(outcome.raw)
    except UnreadableReply as error:
        return None, Judged(reason="failed", detail=str(error), nano=outcome.nano)
    found = {"usage": reply.usage, "nano": outcome.nano}
    if reply.finish_reason == "length":
        detail = f"finish_reason is length after {reply.usage.output_tokens} output tokens"
        return None, Judged(reason="truncated", detail=detail, **found)
    if reply.finish_reason != "stop":
        return None, Judged(reason="failed", detail=f"finish_reason is {reply.finish_reason}", **found)
    return reply, Judged(reason=None, **found)


def boxes_differ(text: str, verifier: Verifier) -> bool:
    """Whether the answer part boxes two answers that are not equal."""
    last = extract_answer(text)
    others = set(boxed_answers(text)) - {last}
    return last is not None and any(verifier.equivalent(other, last).label == "wrong" for other in others)
