"""Long-thought sets of others -> examples to train on, in one text form, with a receipt for every row left out."""

import contextlib
import dataclasses
import os
import pickle
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import IO

from jaxdistill.collect import referee
from jaxdistill.collect.calls import Judged
from jaxdistill.collect.config import RunConfig, ready
from jaxdistill.collect.referee import Decided
from jaxdistill.collect.teacher import TeacherConfig
from jaxdistill.curate.contamination import EvaluationIndex, Read, read_evaluation_sets, read_rows
from jaxdistill.curate.formats import to_example
from jaxdistill.errors import UserError
from jaxdistill.manifest import decontamination, write_config, write_manifest
from jaxdistill.progress import say
from jaxdistill.reading import Dropped, Malformed, check_kept
from jaxdistill.records import Example, Problem, Verdict, to_json, whole_file
from jaxdistill.verify import VerifierPool

_GROUP, _GROUP_CHARACTERS = 1000, 2**24  # rows whose answers are compared together, and what they hold, at most


@dataclasses.dataclass(frozen=True, kw_only=True)
class ImportConfig:
    """Which sets to read."""

    inputs: tuple[Path, ...]  # JSON Lines: messages, ShareGPT, prompt/response, question/reasoning/answer, think tags
    workdir: Path  # run folder: examples.jsonl, dropped.jsonl, config.json, manifest.json
    evaluation_sets: tuple[Path, ...] = ()  # JSON Lines of evaluation problems; rows that repeat one are dropped
    overlap: float = 0.45  # as in `jaxdistill curate`
    verify: bool = True  # drop rows whose answer is known and not the one they reach; without an answer they stay
    verify_timeout_s: float = 10.0  # seconds for one comparison with the known answer
    verify_workers: int = 2  # processes that compare answers
    strict: bool = False  # end at the first malformed line instead of leaving it out
    judge: TeacherConfig = TeacherConfig()  # asked about answers that no rule can compare, once any of it is set
    judge_budget_usd: float | None = None  # of the judge; hard, over all runs on this folder
    judge_budget_tokens: int | None = None  # of the judge, as above; prompt and output together
    unknown_price: bool = False  # ask the judge although nobody knows its price; costs then count as 0

    def __post_init__(self) -> None:
        if not self.inputs:
            raise UserError("inputs is empty, expected one or more JSON Lines files")
        if self.judges and not self.verify:
            raise UserError("judge is set and verify is not; expected both, or neither")
        if self.verify_workers < 1:
            raise UserError(f"verify_workers is {self.verify_workers}, expected at least 1")
        if not self.verify_timeout_s > 0:
            raise UserError(f"verify_timeout_s is {self.verify_timeout_s}, expected more than 0 seconds")

    @property
    def judges(self) -> bool:
        """Whether there is a judge to ask."""
        return self.judge != TeacherConfig()

    @property
    def judge_run(self) -> RunConfig:
        """What the judge's calls are told."""
        budgets = {"budget_usd": self.judge_budget_usd, "budget_tokens": self.judge_budget_tokens}
        common = {"unknown_price": self.unknown_price, "verify_timeout_s": self.verify_timeout_s}
        return referee.run_config(self.workdir, teacher=self.judge, **budgets, **common)


def main(config: ImportConfig) -> Mapping[str, int]:
    """Runs the command anew; returns how many rows were kept, by the shape they had, and dropped by reason.

    Raises:
      UserError: an input is missing, an evaluation set is not whole, or a line is malformed and `strict`; the judge
        cannot be asked.
      RunError: nothing was kept, or the judge is still to be asked about some; all files are written.
    """
    if config.judges:
        ready(config.judge_run)  # refused before hours of comparing, not after
    index = read_evaluation_sets(config.evaluation_sets, config.overlap)
    write_config(config.workdir, config)
    decided: list[Decided] = []
    reasons: Counter[str] = Counter()
    shapes: Counter[str] = Counter()
    with contextlib.ExitStack() as stack:
        verifiers = stack.enter_context(VerifierPool(config.verify_workers, timeout_s=config.verify_timeout_s))
        examples = stack.enter_context(whole_file(config.workdir / "examples.jsonl"))
        dropped = stack.enter_context(whole_file(config.workdir / "dropped.jsonl"))
        compared = _compared(config, index, verifiers)
        if config.judges:
            compared = stack.enter_context(_judged(compared, config, decided))
        for row in _adopted(compared):
            if isinstance(row, Dropped):
                reasons[row.reason] += 1
                dropped.write(to_json(row) + "\n")
            else:
                shapes[row[0]] += 1
                examples.write(to_json(row[1]) + "\n")
    counts = {"kept": shapes.total(), **dict(sorted(reasons.items()))}
    facts = {"shapes": dict(shapes), "decontaminated": decontamination(config.evaluation_sets)}
    facts |= {"judge": decided[0].facts} if decided else {}
    write_manifest(config.workdir, "import", [*config.inputs, *config.evaluation_sets], counts, **facts)
    numbers = ", ".join(f"{number} {name}" for name, number in counts.items())
    say(f"import: {numbers}; kept in {config.workdir / 'examples.jsonl'}, a reason for every other in dropped.jsonl")
    for one in decided:
        one.conclude()
    check_kept(shapes.total(), reasons, config.workdir / "dropped.jsonl")
    return counts


@dataclasses.dataclass(frozen=True)
class _Compared:
    """A row with a whole answer, and how it compares with the known one; None where that was not asked."""

    read: Read
    verdict: Verdict | None
    note: str = ""  # why a judge gave no verdict


def _compared(config: ImportConfig, index: EvaluationIndex, verifiers: VerifierPool) -> Iterator[Dropped | _Compared]:
    rows = map(_usable, read_rows(config.inputs, index, Malformed(config.strict)))
    for group in _groups(rows):
        outputs = [
            (one.row.response or "", one.row.answer)
            for one in group
            if isinstance(one, Read) and config.verify and one.row.answer
        ]
        verdicts = verifiers.verify_all(outputs, phrases=True)
        for one in group:
            if isinstance(one, Dropped):
                yield one
            else:
                yield _Compared(one, next(verdicts) if config.verify and one.row.answer else None)


def _groups(rows: Iterable[Dropped | Read]) -> Iterator[list[Dropped | Read]]:
    """Rows in their order, as many together as are in memory at a time."""
    group: list[Dropped | Read] = []
    characters = 0
    for row in rows:
        group.append(row)
        if isinstance(row, Read):
            characters += len(row.row.reasoning or "") + len(row.row.response or "")
        if len(group) == _GROUP or characters >= _GROUP_CHARACTERS:
            yield group
            group, characters = [], 0
    if group:
        yield group


@contextlib.contextmanager
def _judged(
    compared: Iterable[Dropped | _Compared], config: ImportConfig, decided: list[Decided]
) -> Iterator[Iterator[Dropped | _Compared]]:
    """The rows with a judge's verdicts where no rule had one; they wait in a file while it is asked.

    Args:
      decided: receives what the judge did, if it was asked.
    """
    with tempfile.TemporaryFile(dir=config.workdir) as waiting:
        asked = _Waiting(waiting)
        for row in compared:
            asked.add(row)
        if len(asked):
            decided.append(referee.decide(asked, config.judge_run))
        yield asked.with_words(decided[0].words() if decided else iter(()))


class _Waiting:
    """Rows in a file; those that no rule could compare are questions to a judge, read anew by each iteration."""

    def __init__(self, file: IO[bytes]):
        self._file, self._open = file, 0

    def add(self, row: Dropped | _Compared) -> None:
        """Puts a row behind the others."""
        pickle.dump(row, self._file)
        self._open += _is_open(row)

    def __len__(self) -> int:
        return self._open

    def __iter__(self) -> Iterator[Problem]:
        for row in self._rows():
            if isinstance(row, _Compared) and row.verdict and _is_open(row):
                problem = Problem(id=row.read.place, problem=row.read.row.problem, answer=row.read.row.answer)
                yield referee.question(row.read.place, problem, row.verdict)

    def _rows(self) -> Iterator[Dropped | _Compared]:
        place, end = 0, self._file.seek(0, os.SEEK_END)
        while place < end:
            self._file.seek(place)
            row = pickle.load(self._file)
            place = self._file.tell()
            yield row

    def with_words(self, words: Iterator[Judged | None]) -> Iterator[Dropped | _Compared]:
        """The rows, and on each question what was said."""
        for row in self._rows():
            said = next(words) if _is_open(row) else None
            if said is None or isinstance(row, Dropped):
                yield row
            elif said.verdict:
                yield dataclasses.replace(row, verdict=said.verdict)
            else:
                yield dataclasses.replace(row, note=f"; the judge: {said.detail}")


def _is_open(row: Dropped | _Compared) -> bool:
    return isinstance(row, _Compared) and row.verdict is not None and referee.open_to_judges(row.verdict)


def _adopted(rows: Iterable[Dropped | _Compared]) -> Iterator[Dropped | tuple[str, Example]]:
    """Each row as (shape, example) or as its receipt; ids that come again get a number."""
    used: Counter[str] = Counter()
    for one in rows:
        if isinstance(one, Dropped):
            yield one
            continue
        read, verdict = one.read, one.verdict
        if verdict and verdict.label != "correct":
            detail = (
                f"rule {verdict.rule}: found {verdict.extracted!r}, the known answer is {read.row.answer!r}{one.note}"
            )
            yield Dropped(id=read.id, place=read.place, reason=verdict.label, detail=detail)
            continue
        used[read.id] += 1
        yield read.row.shape, to_example(read.row, read.id if used[read.id] == 1 else f"{read.id}#{used[read.id]}")


def _usable(read: Read | Dropped) -> Read | Dropped:
    """The row if it holds a whole answer to a problem."""
    if isinstance(read, Dropped) or not (read.row.unfinished or read.row.response is None):
        return read
    if read.row.unfinished:
        reason, detail = "unfinished", "the thought was opened and never closed"
    else:
        reason, detail = "no_response", f"a row of shape {read.row.shape} that holds a problem and no answer to it"
    return Dropped(id=read.id, place=read.place, reason=reason, detail=detail)
