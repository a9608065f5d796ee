"""Texts judged by a model, through the collect client: every answer is in a ledger, and none is made up."""

import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from jaxdistill import records
from jaxdistill.collect.calls import Call, Judged, read_whole
from jaxdistill.collect.campaign import answered
from jaxdistill.collect.config import RunConfig, ready
from jaxdistill.collect.output import Tally, conclude
from jaxdistill.collect.reply import read_reply
from jaxdistill.collect.request import Failure, Request, Response
from jaxdistill.collect.teacher import Teacher
from jaxdistill.evaluate.judges import Judge
from jaxdistill.records import Message, Problem, Score
from jaxdistill.verify import Verifier

SCRIPTED = frozenset({"local-teacher"})  # served models whose verdicts are drawn by chance, to try the plumbing
_MOST_QUOTED = 1000  # characters of an answer that could not be read, in the request to mend it


@dataclasses.dataclass(frozen=True, kw_only=True)
class Subject:
    """A text to be judged."""

    id: str  # of the completion, say
    problem: Problem
    response: str


class Judgements:
    """A call for each text, and one more where its answer cannot be read: takes the place of collect's `Sampling`."""

    def __init__(self, subjects: Iterable[Subject], judge: Judge, teacher: Teacher):
        self._subjects = {subject.id: subject for subject in subjects}
        self._judge, self._teacher = judge, teacher
        self._results: dict[str, tuple[Call, Judged]] = {}  # by id of the subject; the last call
        self._unread: dict[str, str] = {}  # by id of the subject; what could not be read

    @property
    def starts(self) -> int:
        """How many texts there are."""
        return len(self._subjects)

    def at_worst(self, call: Call) -> Iterator[tuple[int, int]]:
        """Tokens of the request, and of that to mend it, which quotes its answer."""
        prompt, most = call.request.most_prompt_tokens, call.request.max_tokens
        yield prompt, most
        yield prompt + len(self._judge.repair().encode()) + 4 * _MOST_QUOTED, most

    def start(self) -> list[Call]:
        """The first calls."""
        return [self.first(subject) for subject in self._subjects.values()]

    def first(self, subject: Subject) -> Call:
        """What is asked about a text at first."""
        message = {"role": "user", "content": self._judge.message(subject.problem, subject.response)}
        return self._call(subject, (message,), 0)

    def _call(self, subject: Subject, messages: tuple[Message, ...], index: int) -> Call:
        request: Request = self._teacher.request(messages, index, self._judge.prompt_id(subject.problem))
        return Call(dataclasses.replace(subject.problem, id=subject.id), request, request.key)

    def judge(self, call: Call, outcome: Response | Failure, verifier: Verifier) -> Judged:
        """Whether an answer is whole and holds a verdict."""
        reply, whole = read_whole(outcome)
        if reply is None and whole.reason != "truncated":
            return whole
        assert isinstance(outcome, Response)
        content = read_reply(outcome.raw).content
        if reply is not None and self._judge.read(content) is not None:
            return whole
        self._unread[call.problem.id] = content
        detail = whole.detail or f"no verdict in the answer: {content[-200:]!r}"
        return dataclasses.replace(whole, reason="unreadable", detail=detail)

    def judged(self, call: Call, judged: Judged) -> tuple[bool, list[Call]]:
        """Takes what became of a call; returns whether that is its result, and the request to mend it, once."""
        self._results[call.problem.id] = (call, judged)
        if judged.reason != "unreadable" or call.request.sample_index:
            return True, []
        quoted = self._unread[call.problem.id][-_MOST_QUOTED:].strip() or "(nothing)"
        messages = (
            *call.request.messages,
            {"role": "assistant", "content": quoted},
            {"role": "user", "content": self._judge.repair()},
        )
        return False, [self._call(self._subjects[call.problem.id], messages, 1)]

    def in_order(self) -> Iterator[tuple[Call, Judged]]:
        """All results in the order of the texts."""
        return (self._results[id_] for id_ in self._subjects if id_ in self._results)


def judge_all(
    subjects: Sequence[Subject],
    judge: Judge,
    config: RunConfig,
    folder: Path,
    known: Mapping[str, Score] | None = None,
) -> Iterator[Score]:
    """A score for each text that was judged; the others have none, and a receipt in `dropped.jsonl` of the folder.

    Args:
      config: whom to ask and where the ledger is; several calls may share it, and then its budget.
      known: scores of judgements that were made elsewhere, by key of the request; these are not asked for again.

    Raises:
      UserError: as `jaxdistill.collect.config.ready`, or the API refuses to go on; after all scores.
      RunError: requests are without an answer, over the budget or interrupted; after all scores.
    """
    teacher = ready(config)
    plan = Judgements(subjects, judge, teacher)
    by_id = {subject.id: subject for subject in subjects}
    firsts = {subject.id: plan.first(subject).key for subject in subjects}
    scores = {
        id_: dataclasses.replace(known[key], completion_id=id_) for id_, key in firsts.items() if known and key in known
    }
    plan = Judgements([subject for subject in subjects if subject.id not in scores], judge, teacher)
    receipts, tally = [], Tally()
    with answered(f"{judge.name}: {folder.name}", teacher, plan, config) as (ledger, account, ended):
        for call, judged in plan.in_order():
            tally.add(judged)
            id_ = call.problem.id
            if judged.reason is not None:
                tally.drop(judged.reason, judged.detail)
                receipts.append(call.receipt(judged.reason, judged.detail, judged.usage))
                continue
            response = ledger.result(call.key)
            assert isinstance(response, Response)
            reply = read_reply(response.raw)
            word = judge.read(reply.content)
            assert word is not None
            verdict, points = judge.grade(word, by_id[id_].problem)
            facts = {
                "model": reply.model or teacher.config.model,
                "prompt": call.request.prompt,
                "request_key": firsts[id_],
                "repaired": call.request.sample_index > 0,
                "said": reply.content,
            }
            scores[id_] = Score(completion_id=id_, verdict=verdict, grader=judge.name, points=points, judge=facts)
    found = [scores[subject.id] for subject in subjects if subject.id in scores]
    records.write_jsonl(folder / "judgements.jsonl", found)
    records.write_jsonl(folder / "dropped.jsonl", receipts)
    yield from found
    counts = {"judged": len(scores), "not judged": len(receipts)}
    if subjects:
        conclude(f"judge {folder.name}", folder / "judgements.jsonl", counts, tally, account, ended)
