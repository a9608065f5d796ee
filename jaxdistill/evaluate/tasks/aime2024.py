"""AIME 2024: the 30 problems of both contests, answers 0 to 999."""

from functools import partial

from jaxdistill.evaluate.tasks import BOXED_PROMPT, Task, read_problems

_LICENCE = "problems (c) Mathematical Association of America"
TASK = Task(
    name="aime2024",
    problems_from=partial(read_problems, licence=_LICENCE, extra=("url",)),
    prompt=BOXED_PROMPT,
    grader="boxed_math",
    metric="avg@n",
    licence=_LICENCE,
    why="The headline benchmark of the reference paper; hard enough that long thought decides. Thirty problems make "
    "one sample worth little (13/30 is 27% to 61%), so take 16 or more samples a problem.",
    source="github.com/GAIR-NLP/LIMO, eval/data/aime/test.jsonl",
)
