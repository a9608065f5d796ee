"""GSM8K: 1,319 grade-school word problems with integer answers."""

from functools import partial

from jaxdistill.evaluate.tasks import BOXED_PROMPT, Task, read_problems

TASK = Task(
    name="gsm8k",
    problems_from=partial(read_problems, licence="MIT"),
    prompt=BOXED_PROMPT,
    grader="boxed_math",
    metric="avg@n",
    licence="MIT",
    why="Easy enough to show progress of small models, and large enough for intervals of a few points. Zero-shot "
    "with a boxed answer: figures from 8-shot prompts do not compare.",
    source="github.com/openai/grade-school-math, grade_school_math/data/test.jsonl",
)
