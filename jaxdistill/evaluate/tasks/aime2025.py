"""AIME 2025: the 30 problems of both contests, answers 0 to 999."""

from functools import partial

from jaxdistill.evaluate.tasks import BOXED_PROMPT, Task, read_problems

_LICENCE = "problems (c) Mathematical Association of America"
TASK = Task(
    name="aime2025",
    problems_from=partial(read_problems, licence=_LICENCE),
    prompt=BOXED_PROMPT,
    grader="boxed_math",
    metric="avg@n",
    licence=_LICENCE,
    why="AIME 2024's successor, held after the base models and teachers of the reference paper were trained: a gap "
    "between the two years hints at problems that were seen before. Thirty problems ask for 16 or more samples each.",
    source="github.com/GAIR-NLP/AIME-Preview, eval/data/aime/test2025-I.jsonl and test2025-II.jsonl",
)
