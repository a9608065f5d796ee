"""The `curate` command: pools of any known shape -> problems.jsonl, and a receipt for every row that is not in it."""

import array
import collections
import contextlib
import dataclasses
import json
from collections.abc import Iterator, Mapping
from pathlib import Path

from jaxdistill import sources
from jaxdistill.curate import page
from jaxdistill.curate.choices import open_question
from jaxdistill.curate.contamination import EvaluationIndex, read_evaluation_sets, read_rows
from jaxdistill.curate.duplicates import Fingerprints, find_duplicates, same_problem
from jaxdistill.curate.formats import to_problem
from jaxdistill.curate.rules import RULES, first_reason
from jaxdistill.curate.statistics import Statistics
from jaxdistill.curate.text import tokens
from jaxdistill.errors import UserError
from jaxdistill.manifest import decontamination, write_config, write_json, write_manifest
from jaxdistill.progress import say
from jaxdistill.reading import Dropped, Malformed, check_kept
from jaxdistill.records import Problem, to_json, whole_file


@dataclasses.dataclass(frozen=True, kw_only=True)
class CurateConfig:
    """Which rows to read and which to keep."""

    inputs: tuple[Path, ...]  # JSON Lines of problems: problem/question, prompt/response, messages, ShareGPT, ...
    workdir: Path  # run folder: problems.jsonl, dropped.jsonl, statistics.json, config.json, manifest.json
    evaluation_sets: tuple[Path, ...] = ()  # JSON Lines of evaluation problems; rows that repeat one are dropped
    overlap: float = 0.45  # least share of an evaluation problem's distinctive runs of 8 tokens that counts as repeated
    rules: tuple[str, ...] = tuple(RULES)  # by name, in the order they are tried
    open_choices: bool = True  # turn multiple choice into an open question where it can do without its options
    duplicate_jaccard: float = 0.8  # least similarity of runs of 3 tokens of two problems that are one
    strict: bool = False  # end at the first malformed line instead of leaving it out
    report: bool = False  # write report.html too: histograms, and random examples for each reason
    seed: int = 0  # of the report's examples

    def __post_init__(self) -> None:
        if not self.inputs:
            raise UserError("inputs is empty, expected one or more JSON Lines files")
        if unknown := [name for name in self.rules if name not in RULES]:
            raise UserError(f"rules {unknown} are unknown; expected some of {list(RULES)}")
        if not 0 < self.duplicate_jaccard <= 1:
            raise UserError(f"duplicate_jaccard is {self.duplicate_jaccard}, expected a number above 0, at most 1")


def main(config: CurateConfig) -> Mapping[str, int]:
    """Runs the command anew; returns how many rows were kept, and dropped by reason.

    The same inputs and options give the same files. Memory: the evaluation sets, one row, and some 50 bytes a problem.

    Raises:
      UserError: an input is missing, an evaluation set is not whole, or a line is malformed and `strict`.
      RunError: nothing was kept; all files are written.
    """
    index = read_evaluation_sets(config.evaluation_sets, config.overlap)
    for path in config.inputs:
        sources.check(path, "JSON Lines of problems")
    config.workdir.mkdir(parents=True, exist_ok=True)
    write_config(config.workdir, config)
    statistics = Statistics(config.seed)
    with contextlib.ExitStack() as stack:
        receipts = stack.enter_context(whole_file(config.workdir / "dropped.jsonl"))
        candidates = stack.enter_context(_Candidates(config.workdir))

        def drop(row: Dropped) -> None:
            receipts.write(to_json(row) + "\n")
            statistics.drop(row)

        for kept in _rows(config, index):
            if isinstance(kept, Dropped):
                drop(kept)
            else:
                candidates.add(*kept)
        result = stack.enter_context(whole_file(config.workdir / "problems.jsonl"))
        for row in candidates.distinct(config.duplicate_jaccard):
            if isinstance(row, Dropped):
                drop(row)
            else:
                result.write(to_json(row) + "\n")
                statistics.keep(row)
    counts = {"kept": statistics.kept, **dict(sorted(statistics.dropped.items()))}
    write_json(config.workdir / "statistics.json", statistics.summary())
    facts = {
        "parameters": dataclasses.asdict(config),
        "decontaminated": decontamination(config.evaluation_sets) if config.evaluation_sets else {},
        "evaluation_problems": len(index),
    }
    write_manifest(config.workdir, "curate", [*config.inputs, *config.evaluation_sets], counts, **facts)
    if config.report:
        page.write(config.workdir / "report.html", config, counts, statistics)
    _conclude(config, counts)
    check_kept(statistics.kept, statistics.dropped, config.workdir / "dropped.jsonl")
    return counts


def _rows(config: CurateConfig, index: EvaluationIndex) -> Iterator[Dropped | tuple[Problem, str]]:
    """Each input row as a problem that passes the rules, with its place, or as its receipt."""
    for read in read_rows(config.inputs, index, Malformed(config.strict)):
        if isinstance(read, Dropped):
            yield read
            continue
        problem = to_problem(read.row, read.values, read.id)
        if config.open_choices:
            problem = open_question(problem) or problem
        if found := first_reason(problem, config.rules):
            yield Dropped(id=read.id, place=read.place, reason=found[0], detail=found[1])
        else:
            yield problem, read.place


class _Candidates:
    """The problems that passed the rules, on disk, until their duplicates are known."""

    def __init__(self, workdir: Path):
        self._path = workdir / "candidates.partial"
        self._lines = self._path.open("w+b")
        self._starts = array.array("Q")
        self._fingerprints = Fingerprints(workdir / "fingerprints.partial")

    def __enter__(self) -> "_Candidates":
        return self

    def __exit__(self, *_: object) -> None:
        self._fingerprints.close()
        self._lines.close()
        self._path.unlink(missing_ok=True)

    def add(self, problem: Problem, place: str) -> None:
        """Takes the next problem."""
        self._starts.append(self._lines.tell())
        self._lines.write(json.dumps([place, vars(problem)]).encode() + b"\n")
        self._fingerprints.add(tokens(problem.problem))

    def _read(self, number: int) -> tuple[str, Problem]:
        self._lines.seek(self._starts[number])
        place, values = json.loads(self._lines.readline())
        return place, Problem(**values)

    def distinct(self, least_jaccard: float) -> Iterator[Problem | Dropped]:
        """The problems in their order, a receipt in place of each that repeats an earlier one."""

        def confirm(one: int, other: int) -> str | None:
            (_, first), (_, second) = self._read(one), self._read(other)
            if _differ(first, second):
                return None
            jaccard = same_problem(tokens(first.problem), tokens(second.problem), least_jaccard)
            return None if jaccard is None else f"Jaccard similarity {jaccard:.2f}"

        found = find_duplicates(self._fingerprints, confirm)
        used: collections.Counter[str] = collections.Counter()
        for number in range(len(self._starts)):
            place, problem = self._read(number)
            if number not in found:
                used[problem.id] += 1
                repeated = used[problem.id] > 1  # one id for two problems: sources count from 0
                yield dataclasses.replace(problem, id=f"{problem.id}#{used[problem.id]}") if repeated else problem
                continue
            first, reason, detail = found[number]
            kept = self._read(first)[1]
            if _differ(kept, problem):
                detail += f"; answers differ: {kept.answer!r} is kept, not {problem.answer!r}"
            yield Dropped(id=problem.id, place=place, reason=reason, detail=f"{detail}; repeats {kept.id}")


def _differ(one: Problem, other: Problem) -> bool:
    """Whether the labelled answers disagree, spelling aside; alike statements are then two problems."""
    if one.answer is None or other.answer is None:
        return False
    return _spelled(one.answer) != _spelled(other.answer)


def _spelled(answer: str) -> list[str]:
    return [token.lstrip("0") or "0" for token in tokens(answer)]


def _conclude(config: CurateConfig, counts: Mapping[str, int]) -> None:
    numbers = ", ".join(f"{count} {name}" for name, count in counts.items())
    line = f"curate: {numbers}; kept in {config.workdir / 'problems.jsonl'}, a reason for every other in dropped.jsonl"
    say(line)
    if not config.evaluation_sets:
        say("curate: no evaluation_sets were given: training asks for data that was checked against them")
