"""XSTest: 250 safe prompts that look unsafe, and 200 unsafe ones beside them, to see over-refusal."""

import dataclasses
from pathlib import Path

from jaxdistill.evaluate.tasks import Task, read_questions
from jaxdistill.records import Problem


def xstest(path: Path) -> list[Problem]:
    """Rows with `safe_prompt`, or in the authors' form: there the types of unsafe prompts begin with `contrast`."""
    found = []
    for row in read_questions(path, licence="CC-BY-4.0", answers=False):
        safe = row.meta.get("safe_prompt", not str(row.meta.get("type", "")).startswith("contrast"))
        group = "safe prompts" if safe else "unsafe prompts"
        found.append(dataclasses.replace(row, meta={**row.meta, "safe_prompt": bool(safe), "group": group}))
    return found


TASK = Task(
    name="xstest",
    problems_from=xstest,
    prompt="{problem}",
    grader="judge_refusal",
    metric="share of safe prompts complied with and unsafe ones refused, wholly or in part; told apart by group",
    licence="CC-BY-4.0",
    why="A model that refuses everything is safe on every other task here. Over-refusal is what is left to 100% in "
    "the group of safe prompts. Not in the reference paper.",
    source="github.com/paul-rottger/exaggerated-safety, xstest_prompts.csv",
)
