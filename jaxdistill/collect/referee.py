"""A judge model's word on answers that no rule can compare with the gold one: calls with a ledger of their own."""

import dataclasses
import functools
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from jaxdistill.collect.calls import Call, Judged, read_whole
from jaxdistill.collect.campaign import answered
from jaxdistill.collect.config import RunConfig, ready
from jaxdistill.collect.output import Tally, costs
from jaxdistill.collect.prompting import COLLECT_PROMPTS, fill, prompt_id, read_prompt
from jaxdistill.collect.request import Failure, Request, Response
from jaxdistill.collect.sampling import Problems, Sampling
from jaxdistill.collect.teacher import Teacher
from jaxdistill.errors import RunError
from jaxdistill.records import Problem, Verdict
from jaxdistill.verify import ANSWER_CHARACTERS, Verifier

_PROMPT = "same_answer.v1"
_WORD = re.compile(r"^\W*Verdict:\W*(same|different)\W*\Z", re.IGNORECASE | re.MULTILINE)
_LABELS: Mapping[str, Any] = {"same": "correct", "different": "wrong"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Decided:
    """What a judge said."""

    answers: Sampling
    facts: Mapping[str, Any]  # for the manifest
    unfinished: str = ""  # why some were not asked; empty if all were

    def words(self) -> Iterator[Judged | None]:
        """What was said on each question, in their order: a verdict, or why there is none; None where not asked."""
        return (results[0][1] if results else None for _, results in self.answers.by_problem())

    def conclude(self) -> None:
        """Raises RunError if some are still to be asked."""
        if self.unfinished:
            raise RunError(f"the judge: {self.unfinished}; run the same command again: it asks for these alone")


class Undecided:
    """The whole answers of a run that boxed something which no rule could compare, as questions to a judge."""

    def __init__(self, sampling: Sampling):
        self._sampling = sampling
        self._count = sum(1 for _ in self.results())

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[Problem]:
        return (question(call.id, call.problem, verdict) for call, _, verdict in self.results())

    def results(self) -> Iterator[tuple[Call, Judged, Verdict]]:
        """What they are of."""
        for call, judged in self._sampling.in_order():
            if judged.verdict and open_to_judges(judged.verdict):
                yield call, judged, judged.verdict


def open_to_judges(verdict: Verdict) -> bool:
    """Whether an answer was found that no rule could compare."""
    return verdict.label == "unverifiable" and bool(verdict.extracted)


def question(name: str, problem: Problem, verdict: Verdict) -> Problem:
    """What a judge is asked about an answer."""
    asked = {"answer": verdict.extracted}
    return Problem(id=name, problem=problem.problem, answer=problem.answer, meta=asked)


def at_worst(teacher: Teacher, problem: Problem) -> tuple[int, int]:
    """Most tokens of the prompt and of the output of a question about an answer to a problem."""
    longest = Verdict(label="unverifiable", rule="", extracted="")
    request = _request(teacher, question(problem.id, problem, longest), 0, None)
    return request.most_prompt_tokens + 4 * ANSWER_CHARACTERS, request.max_tokens


def _request(teacher: Teacher, asked: Problem, sample_index: int, max_tokens: int | None) -> Request:
    template = read_prompt(_PROMPT, COLLECT_PROMPTS)
    values = {"problem": asked.problem, "gold": asked.answer or "", "answer": asked.meta["answer"]}
    message = {"role": "user", "content": fill(template, values)}
    return teacher.request((message,), sample_index, prompt_id(_PROMPT, template), max_tokens)


def decide(questions: Problems, config: RunConfig) -> Decided:
    """Asks about each, once; equal questions are one request. A word that cannot be read decides nothing.

    The verdict's rule names the judge and the prompt: `judge/MODEL/same_answer.v1@hash`.

    Raises:
      UserError: as `ready`.
    """
    teacher, template = ready(config), read_prompt(_PROMPT, COLLECT_PROMPTS)
    name = prompt_id(_PROMPT, template)
    rule = f"judge/{config.teacher.model}/{name}"

    def reading(call: Call, outcome: Response | Failure, verifier: Verifier) -> Judged:
        reply, whole = read_whole(outcome)
        if reply is None:
            return whole
        if (word := _WORD.search(reply.content.strip())) is None:
            return dataclasses.replace(whole, reason="unreadable", detail=f"no verdict: {reply.content[-200:]!r}")
        verdict = Verdict(label=_LABELS[word[1].lower()], rule=rule, extracted=call.problem.meta["answer"])
        return dataclasses.replace(whole, verdict=verdict)

    sampling = Sampling(questions, functools.partial(_request, teacher), samples=1, judging=reading)
    decided, tally = 0, Tally()
    with answered("judge", teacher, sampling, config) as (_, account, ended):
        for _, judged in sampling.in_order():
            decided += judged.verdict is not None
            tally.add(judged)
    left = f"{tally.left} requests have no answer yet, such as: {tally.commonest(again=True)}" if tally.left else ""
    facts = {
        "model": config.teacher.model,
        "prompt": {"name": name, "text": template},
        "asked": len(questions),
        "decided": decided,
        **costs(account, sampling.paid(), teacher),
    }
    return Decided(answers=sampling, facts=facts, unfinished=ended or left)


def apply(decided: Decided, undecided: Undecided, sampling: Sampling) -> None:
    """Puts what was decided in the place of the verdicts that said nothing."""
    for (call, judged, _), said in zip(undecided.results(), decided.words(), strict=True):
        if said is None:
            continue
        if verdict := said.verdict:
            detail = f"rule {verdict.rule}: found {verdict.extracted!r}, gold answer {call.problem.answer!r}"
            reason = None if verdict.label == "correct" else "wrong"
            sampling.put(call, dataclasses.replace(judged, verdict=verdict, reason=reason, detail=detail))
        else:
            sampling.put(call, dataclasses.replace(judged, detail=f"{judged.detail}; the judge: {said.detail}"))


def run_config(workdir: Path, **judge: Any) -> RunConfig:
    """The judge's share of a command's configuration, in a folder of its own within the command's."""
    return RunConfig(workdir=workdir / "judge", **judge)
