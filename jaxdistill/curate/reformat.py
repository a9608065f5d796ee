"""Phase-1 data of the paper: each problem's own solution, rewritten by a model step by step, in more detail, boxed."""

import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path

from jaxdistill.collect.calls import Reason, Receipt, malformed_line
from jaxdistill.collect.config import RunConfig
from jaxdistill.curate.examples import example
from jaxdistill.curate.gates import reformat_gate
from jaxdistill.curate.rewriting import Rewriting, Rewritten
from jaxdistill.reading import Dropped, Rows
from jaxdistill.records import Example, Problem
from jaxdistill.verify import Verifier


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReformatConfig(RunConfig):
    """Which solutions to rewrite, by whom, where the examples go, and what it may cost."""

    problems: Path  # JSON Lines of Problem, each with a solution and an answer
    prompt: str = "reformat.v1"  # user message with {problem} and {solution}, a file of curate/prompts without its .txt
    strict: bool = False  # end at a malformed line, before anything is asked, instead of leaving it out


def main(config: ReformatConfig) -> Mapping[str, int]:
    """Runs the command, or continues it; returns the numbers of rewrites kept and dropped by reason.

    Kept: finished, and what `reformat_gate` lets pass.

    Raises: as `Rewriting.run`.
    """
    problems = Rows(config.problems, Problem, strict=config.strict, wanted=_usable, unique=True)
    rewriting = Rewriting(
        command="reformat", source=config.problems, prompt=config.prompt, fields=_fields, gate=_gate, tries=1
    )

    def finish(rewritten: Iterator[Rewritten]) -> Iterator[Example | Receipt]:
        for row in problems.everything():
            if isinstance(row, Dropped):
                yield malformed_line(row)
            elif not _usable(row):
                yield _unasked(row)
            elif (one := next(rewritten)).answer is not None:
                yield example(row, one.answer, suffix="reformatted")
            elif one.receipt:
                yield one.receipt

    return rewriting.run(config, problems, finish)


def _fields(problem: Problem) -> Mapping[str, str]:
    return {"problem": problem.problem, "solution": problem.solution or ""}


def _gate(problem: Problem, solution: str, verifier: Verifier) -> tuple[Reason, str] | None:
    return reformat_gate(problem, problem.problem, solution, verifier)


def _usable(problem: Problem) -> bool:
    return problem.answer is not None and bool(problem.solution)


def _unasked(problem: Problem) -> Receipt:
    """Why a problem is not asked about."""
    detail = f"the problem has no {'gold answer' if problem.answer is None else 'solution'}; not asked"
    return Receipt(id=problem.id, problem_id=problem.id, reason="unverifiable", detail=detail)
