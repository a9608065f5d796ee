"""Long-thought sets of others -> examples to train on, in one text form, with a receipt for every row left out."""

import contextlib
import dataclasses
import itertools
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path

from jaxdistill.curate.contamination import EvaluationIndex, Read, read_evaluation_sets, read_rows
from jaxdistill.curate.formats import to_example
from jaxdistill.errors import UserError
from jaxdistill.manifest import decontamination, write_config, write_manifest
from jaxdistill.progress import say
from jaxdistill.reading import Dropped, Malformed, check_kept
from jaxdistill.records import Example, to_json, whole_file
from jaxdistill.verify import VerifierPool

_GROUP = 1000  # rows whose answers are compared together


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

    def __post_init__(self) -> None:
        if not self.inputs:
            raise UserError("inputs is empty, expected one or more JSON Lines files")
        if self.verify_workers < 1:
            raise UserError(f"verify_workers is {self.verify_workers}, expected at least 1")
        if not self.verify_timeout_s > 0:
            raise UserError(f"verify_timeout_s is {self.verify_timeout_s}, expected more than 0 seconds")


def main(config: ImportConfig) -> Mapping[str, int]:
    """Runs the command anew; returns how many rows were kept, by the shape they had, and dropped by reason.

    Raises:
      UserError: an input is missing, an evaluation set is not whole, or a line is malformed and `strict`.
      RunError: nothing was kept; all files are written.
    """
    index = read_evaluation_sets(config.evaluation_sets, config.overlap)
    write_config(config.workdir, config)
    reasons: Counter[str] = Counter()
    shapes: Counter[str] = Counter()
    with contextlib.ExitStack() as stack:
        verifiers = stack.enter_context(VerifierPool(config.verify_workers, timeout_s=config.verify_timeout_s))
        examples = stack.enter_context(whole_file(config.workdir / "examples.jsonl"))
        dropped = stack.enter_context(whole_file(config.workdir / "dropped.jsonl"))
        for row in _rows(config, index, verifiers):
            if isinstance(row, Dropped):
                reasons[row.reason] += 1
                dropped.write(to_json(row) + "\n")
            else:
                shapes[row[0]] += 1
                examples.write(to_json(row[1]) + "\n")
    counts = {"kept": shapes.total(), **dict(sorted(reasons.items()))}
    facts = {"shapes": dict(shapes), "decontaminated": decontamination(config.evaluation_sets)}
    write_manifest(config.workdir, "import", [*config.inputs, *config.evaluation_sets], counts, **facts)
    numbers = ", ".join(f"{number} {name}" for name, number in counts.items())
    say(f"import: {numbers}; kept in {config.workdir / 'examples.jsonl'}, a reason for every other in dropped.jsonl")
    check_kept(shapes.total(), reasons, config.workdir / "dropped.jsonl")
    return counts


def _rows(
    config: ImportConfig, index: EvaluationIndex, verifiers: VerifierPool
) -> Iterator[Dropped | tuple[str, Example]]:
    """Each input row as (shape, example) or as its receipt; ids that come again get a number."""
    used: Counter[str] = Counter()
    rows = map(_usable, read_rows(config.inputs, index, Malformed(config.strict)))
    while group := list(itertools.islice(rows, _GROUP)):
        outputs = [
            (one.row.response or "", one.row.answer)
            for one in group
            if isinstance(one, Read) and config.verify and one.row.answer
        ]
        verdicts = verifiers.verify_all(outputs, phrases=True)
        for one in group:
            if isinstance(one, Dropped):
                yield one
                continue
            if config.verify and one.row.answer and (verdict := next(verdicts)).label != "correct":
                detail = f"rule {verdict.rule}: found {verdict.extracted!r}, the known answer is {one.row.answer!r}"
                yield Dropped(id=one.id, place=one.place, reason=verdict.label, detail=detail)
                continue
            used[one.id] += 1
            yield one.row.shape, to_example(one.row, one.id if used[one.id] == 1 else f"{one.id}#{used[one.id]}")


def _usable(read: Read | Dropped) -> Read | Dropped:
    """The row if it holds a whole answer to a problem."""
    if isinstance(read, Dropped) or not (read.row.unfinished or read.row.response is None):
        return read
    if read.row.unfinished:
        reason, detail = "unfinished", "the thought was opened and never closed"
    else:
        reason, detail = "no_response", f"a row of shape {read.row.shape} that holds a problem and no answer to it"
    return Dropped(id=read.id, place=read.place, reason=reason, detail=detail)
