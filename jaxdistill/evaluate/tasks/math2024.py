"""MATH2024: 30 problems of China's national high-school competition of 2024, in English."""

from functools import partial

from jaxdistill.evaluate.tasks import BOXED_PROMPT, Task, read_problems

_LICENCE = "none stated"
TASK = Task(
    name="math2024",
    problems_from=partial(read_problems, licence=_LICENCE, extra=("note",)),
    prompt=BOXED_PROMPT,
    grader="boxed_math",
    metric="avg@n",
    licence=_LICENCE,
    why="Problems of late 2024, and not from the United States' contests that most training pools draw on. Number 15 "
    "is a flawed near-copy of number 7: say whether a figure counts it.",
    source="github.com/GAIR-NLP/LIMO, eval/data/cn_math_2024/test.jsonl",
)
