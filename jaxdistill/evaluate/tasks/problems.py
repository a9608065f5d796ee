"""Anyone's own problems: a JSON Lines file of Problem rows with answers."""

from jaxdistill.evaluate.tasks import BOXED_PROMPT, Task, read_problems

TASK = Task(
    name="problems",
    problems_from=read_problems,
    prompt=BOXED_PROMPT,
    grader="boxed_math",
    metric="avg@n",
    licence="that of the file's rows",
    why="Held-out problems of the distilled set itself, or a benchmark that has no file here.",
    source="a local file",
)
