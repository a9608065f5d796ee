"""Phase-1 data of the paper: each problem's own solution, rewritten by a model step by step, in more detail, boxed."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path

from jaxdistill.collect.calls import Reason, Receipt
from jaxdistill.collect.config import RunConfig
from jaxdistill.curate.examples import example
from jaxdistill.curate.gates import reformat_gate
from jaxdistill.curate.rewriting import Rewriting
from jaxdistill.records import Example, Problem, read_problems
from jaxdistill.verify import Verifier


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReformatConfig(RunConfig):
    """Which solutions to rewrite, by whom, where the examples go, and what it may cost."""

    problems: Path  # JSON Lines of Problem, each with a solution and an answer
    prompt: str = "reformat.v1"  # user message with {problem} and {solution}, a file of curate/prompts without its .txt


def main(config: ReformatConfig) -> Mapping[str, int]:
    """Runs the command, or continues it; returns the numbers of rewrites kept and dropped by reason.

    Kept: finished, and what `reformat_gate` lets pass.

    Raises: as `Rewriting.run`.
    """
    problems = read_problems(config.problems, answers=False)
    rewriting = Rewriting(
        command="reformat", source=config.problems, prompt=config.prompt, fields=_fields, gate=_gate, tries=1
    )
    unasked = [receipt for problem in problems if (receipt := _unusable(problem))]

    def finish(passed: dict[str, str], refused: dict[str, Receipt]) -> tuple[list[Example], list[Receipt]]:
        kept = [example(p, passed[p.id], suffix="reformatted") for p in problems if p.id in passed]
        return kept, [*unasked, *refused.values()]

    return rewriting.run(config, [problem for problem in problems if not _unusable(problem)], finish)


def _fields(problem: Problem) -> Mapping[str, str]:
    return {"problem": problem.problem, "solution": problem.solution or ""}


def _gate(problem: Problem, solution: str, verifier: Verifier) -> tuple[Reason, str] | None:
    return reformat_gate(problem, problem.problem, solution, verifier)


def _unusable(problem: Problem) -> Receipt | None:
    """Why a problem is not asked about."""
    if problem.answer is not None and problem.solution:
        return None
    detail = f"the problem has no {'gold answer' if problem.answer is None else 'solution'}; not asked"
    return Receipt(id=problem.id, problem_id=problem.id, reason="unverifiable", detail=detail)
