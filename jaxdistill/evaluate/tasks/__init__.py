"""A benchmark is a file of this folder, found by its name, that defines TASK."""

import dataclasses
import hashlib
import importlib
import pkgutil
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from jaxdistill.errors import UserError
from jaxdistill.evaluate.judges import JUDGES, Judge
from jaxdistill.records import Problem, read_problems

BOXED_PROMPT = "{problem}\n\nPlease reason step by step, and put your final answer within \\boxed{}."


@dataclasses.dataclass(frozen=True, kw_only=True)
class Task:
    """A benchmark: where its problems come from, how they are put and graded, and why it is worth running."""

    name: str
    problems_from: Callable[[Path], list[Problem]]  # reads a local file; UserError where it is not this task's
    prompt: str  # template: {problem} is replaced, other braces stay
    grader: str  # name in GRADERS of evaluate/grade.py, or in JUDGES of evaluate/judges; recorded in every Score
    metric: str  # the headline number
    licence: str
    why: str  # why the benchmark was chosen: the transparency index asks
    source: str  # where the file can be had

    def __post_init__(self) -> None:
        if "{problem}" not in self.prompt:
            raise ValueError(f"task {self.name}: prompt is {self.prompt!r}, expected a template with {{problem}}")

    @property
    def judge(self) -> Judge | None:
        """Who grades it, where no rule can."""
        return JUDGES.get(self.grader)

    def ask(self, problem: Problem) -> str:
        """The text to send for one problem."""
        return self.prompt.replace("{problem}", problem.problem)


def names() -> list[str]:
    """All tasks, in alphabetical order."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__))


def task(name: str) -> Task:
    """The task of that name.

    Raises:
      UserError: there is no such task; names those there are.
    """
    if name not in names():
        raise UserError(f"no task is named {name!r}; expected one of {names()}, or `problems` for a file of your own")
    return importlib.import_module(f"{__name__}.{name}").TASK


def read_questions(path: Path, *, licence: str, group: str | None = None, answers: bool = True) -> list[Problem]:
    """Reads rows with a `question`, or a `problem`, for a judge; all keys that a Problem has not move to `meta`.

    The language is that of `lang` or `language`, else Chinese where a quarter of the question is.

    Args:
      group: the key by which results are told apart, kept as `meta["group"]`.

    Raises: as `read_problems`.
    """

    def converted(number: int, row: dict[str, Any]) -> dict[str, Any]:
        own = {{"question": "problem", "lang": "language"}.get(key, key): value for key, value in row.items()}
        known = {field.name for field in dataclasses.fields(Problem)} - {"meta"}
        meta = {key: value for key, value in own.items() if key not in known}
        if group is not None:
            meta["group"] = str(row.get(group, "unknown"))
        own = {key: value for key, value in own.items() if key in known}
        text = str(own.get("problem"))
        language = "zh" if 4 * len(re.findall("[\u4e00-\u9fff]", text)) > len(text) else "en"
        return {"id": f"{path.stem}-{number}", "language": language, **own, "meta": meta}

    return read_problems(path, licence=licence, convert=converted, answers=answers)


def select(problems: Sequence[Problem], limit: int | None, seed: int) -> list[Problem]:
    """A fixed random subset, in the order of the file; None takes all.

    Problems are ranked by the hash of seed and id: the choice does not depend on the order of the file, and a larger
    limit keeps the problems of a smaller one.

    Raises:
      UserError: the limit is not between 1 and the number of problems.
    """
    if limit is None:
        return list(problems)
    if not 1 <= limit <= len(problems):
        raise UserError(f"limit is {limit}, expected 1 to {len(problems)}, the number of problems in the file")
    ranked = sorted(problems, key=lambda problem: hashlib.sha256(f"{seed}/{problem.id}".encode()).digest())
    chosen = {problem.id for problem in ranked[:limit]}
    return [problem for problem in problems if problem.id in chosen]
