"""AMC 2023: 40 problems of both AMC 12 contests, as questions with a number for an answer."""

from functools import partial

from jaxdistill.evaluate.tasks import BOXED_PROMPT, Task, read_problems

_LICENCE = "problems (c) Mathematical Association of America"
TASK = Task(
    name="amc23",
    problems_from=partial(read_problems, licence=_LICENCE, extra=("url",)),
    prompt=BOXED_PROMPT,
    grader="boxed_math",
    metric="avg@n",
    licence=_LICENCE,
    why="Between MATH500 and AIME in difficulty, where small models already differ. The contest's choices are left "
    "out, so figures from multiple choice do not compare; 40 problems ask for several samples each.",
    source="github.com/GAIR-NLP/LIMO, eval/data/amc/test.jsonl",
)
