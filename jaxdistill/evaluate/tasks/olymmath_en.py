"""OlymMATH in English: 200 olympiad problems, half of them hard; `olymmath_zh` has the same ones in Chinese."""

from functools import partial
from pathlib import Path
from typing import Any

from jaxdistill.errors import UserError
from jaxdistill.evaluate.tasks import BOXED_PROMPT, Task, read_problems
from jaxdistill.records import Problem

LICENCE, SOURCE = "MIT", "github.com/RUCAIBox/Slow_Thinking_with_LLMs, OlymMATH/data"


def of_language(path: Path, language: str) -> list[Problem]:
    """The problems of one language, from a file that may hold both."""
    rows = read_problems(path, licence=LICENCE, extra=("subject", "level"), convert=_named)
    found = [row for row in rows if row.language == language]
    if not found:
        raise UserError(f"{path}: none of the {len(rows)} rows has the lang {language!r}; expected OlymMATH's files")
    return found


def _named(_: int, row: dict[str, Any]) -> dict[str, Any]:
    return {"language" if key == "lang" else key: value for key, value in row.items()}


TASK = Task(
    name="olymmath_en",
    problems_from=partial(of_language, language="en"),
    prompt=BOXED_PROMPT,
    grader="boxed_math",
    metric="avg@n",
    licence=LICENCE,
    why="Harder than AIME, and taken from printed books by its authors rather than from the web. The same problems in "
    "two languages show what a model that was distilled in one of them lost in the other.",
    source=SOURCE,
)
