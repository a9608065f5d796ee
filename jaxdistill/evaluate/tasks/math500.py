"""MATH500: 500 competition problems of MATH's test set, with LaTeX answers."""

from functools import partial

from jaxdistill.evaluate.tasks import BOXED_PROMPT, Task, read_problems

TASK = Task(
    name="math500",
    problems_from=partial(read_problems, licence="MIT", extra=("subject", "level")),
    prompt=BOXED_PROMPT,
    grader="boxed_math",
    metric="avg@n",
    licence="MIT",
    why="Reported by the reference paper and by most reasoning models; five levels and seven subjects between "
    "GSM8K and AIME in difficulty.",
    source="github.com/mlfoundations/evalchemy, eval/chat_benchmarks/MATH500/data/math500.jsonl",
)
