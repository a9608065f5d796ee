"""A judge model's word on answers that no rule can compare with the gold one: calls with a ledger of their own."""

import dataclasses
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from jaxdistill.collect.calls import Call, Judged, read_whole
from jaxdistill.collect.campaign import answered
from jaxdistill.collect.config import RunConfig, ready
from jaxdistill.collect.output import costs
from jaxdistill.collect.prompting import COLLECT_PROMPTS, fill, prompt_id, read_prompt
from jaxdistill.collect.request import Failure, Request, Response
from jaxdistill.collect.sampling import Sampling
from jaxdistill.errors import RunError
from jaxdistill.records import Problem, Verdict
from jaxdistill.verify import Verifier

_PROMPT = "same_answer.v1"
_WORD = re.compile(r"^\W*Verdict:\W*(same|different)\W*\Z", re.IGNORECASE | re.MULTILINE)
_LABELS: Mapping[str, Any] = {"same": "correct", "different": "wrong"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Decided:
    """What a judge said."""

    asked: int
    verdicts: Mapping[str, Verdict]  # by id of the chain
    unread: Mapping[str, str]  # why there is none, by id of the chain
    facts: Mapping[str, Any]  # for the manifest
    unfinished: str = ""  # why some were not asked; empty if all were

    def conclude(self) -> None:
        """Raises RunError if some are still to be asked."""
        if self.unfinished:
            raise RunError(f"the judge: {self.unfinished}; run the same command again: it asks for these alone")


def undecided(results: Iterable[tuple[Call, Judged]]) -> dict[str, tuple[Call, Judged]]:
    """The whole answers, by id of their chain, that boxed something which no rule could compare."""
    return {
        call.id: (call, judged)
        for call, judged in results
        if judged.verdict and judged.verdict.label == "unverifiable" and judged.verdict.extracted
    }


def decide(open_ones: Mapping[str, tuple[Call, Judged]], config: RunConfig) -> Decided:
    """Asks about each, once; equal questions are one request. A word that cannot be read decides nothing.

    The verdict's rule names the judge and the prompt: `judge/MODEL/same_answer.v1@hash`.

    Raises:
      UserError: as `ready`.
    """
    teacher, template = ready(config), read_prompt(_PROMPT, COLLECT_PROMPTS)
    name = prompt_id(_PROMPT, template)
    rule = f"judge/{config.teacher.model}/{name}"

    def asking(question: Problem, sample_index: int, max_tokens: int | None) -> Request:
        values = {"problem": question.problem, "gold": question.answer or "", "answer": question.meta["answer"]}
        message = {"role": "user", "content": fill(template, values)}
        return teacher.request((message,), sample_index, name, max_tokens)

    def reading(call: Call, outcome: Response | Failure, verifier: Verifier) -> Judged:
        reply, whole = read_whole(outcome)
        if reply is None:
            return whole
        if (word := _WORD.search(reply.content.strip())) is None:
            return dataclasses.replace(whole, reason="unreadable", detail=f"no verdict: {reply.content[-200:]!r}")
        verdict = Verdict(label=_LABELS[word[1].lower()], rule=rule, extracted=call.problem.meta["answer"])
        return dataclasses.replace(whole, verdict=verdict)

    questions = [_question(call, judged) for call, judged in open_ones.values()]
    sampling = Sampling(questions, asking, samples=1, judging=reading)
    with answered("judge", teacher, sampling, config) as (_, account, ended):
        results = list(sampling.in_order())
    verdicts = {call.problem.id: judged.verdict for call, judged in results if judged.verdict}
    left = [judged.detail for _, judged in results if judged.again]
    unfinished = ended or (f"{len(left)} requests have no answer yet, such as: {left[0][:300]}" if left else "")
    facts = {
        "model": config.teacher.model,
        "prompt": {"name": name, "text": template},
        "asked": len(questions),
        "decided": len(verdicts),
        **costs(account, sampling, teacher),
    }
    unread = {call.problem.id: judged.detail for call, judged in results if judged.reason}
    return Decided(asked=len(questions), verdicts=verdicts, unread=unread, facts=facts, unfinished=unfinished)


def apply(decided: Decided, results: dict[str, tuple[Call, Judged]]) -> None:
    """Puts what was decided in the place of the verdicts that said nothing."""
    for name, verdict in decided.verdicts.items():
        call, judged = results[name]
        detail = f"rule {verdict.rule}: found {verdict.extracted!r}, gold answer {call.problem.answer!r}"
        reason = None if verdict.label == "correct" else "wrong"
        results[name] = call, dataclasses.replace(judged, verdict=verdict, reason=reason, detail=detail)
    for name, why in decided.unread.items():
        call, judged = results[name]
        results[name] = call, dataclasses.replace(judged, detail=f"{judged.detail}; the judge: {why}")


def run_config(config: RunConfig, **judge: Any) -> RunConfig:
    """The judge's share of a command's configuration, in a folder of its own."""
    common = {"unknown_price": config.unknown_price, "verify_timeout_s": config.verify_timeout_s}
    return RunConfig(workdir=Path(config.workdir, "judge"), **common, **judge)


def _question(call: Call, judged: Judged) -> Problem:
    assert judged.verdict
    asked = {"answer": judged.verdict.extracted}
    return Problem(id=call.id, problem=call.problem.problem, answer=call.problem.answer, meta=asked)
