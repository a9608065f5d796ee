"""GSM8K: 1,319 grade-school word problems with integer answers."""

from functools import partial
from typing import Any

from jaxdistill.evaluate.tasks import BOXED_PROMPT, Task, read_problems


def from_upstream(number: int, row: dict[str, Any]) -> dict[str, Any]:
    """The published file has `question`, and an `answer` that works it out and ends in `#### 18`."""
    if row.keys() - {"id"} != {"question", "answer"}:
        return row
    solution, _, answer = str(row["answer"]).rpartition("####")
    values = {"problem": row["question"], "answer": answer.strip().replace(",", ""), "solution": solution.strip()}
    return {"id": f"gsm8k-test-{number}", **values}


TASK = Task(
    name="gsm8k",
    problems_from=partial(read_problems, licence="MIT", convert=from_upstream),
    prompt=BOXED_PROMPT,
    grader="boxed_math",
    metric="avg@n",
    licence="MIT",
    why="Easy enough to show progress of small models, and large enough for intervals of a few points. Zero-shot "
    "with a boxed answer: figures from 8-shot prompts do not compare.",
    source="github.com/openai/grade-school-math, grade_school_math/data/test.jsonl",
)
