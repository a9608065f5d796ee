"""SimpleQA: 4,326 short questions with one answer each, hard to know by heart."""

from functools import partial

from jaxdistill.evaluate.tasks import Task, read_questions

TASK = Task(
    name="simpleqa",
    problems_from=partial(read_questions, licence="MIT", group="topic"),
    prompt="{problem}",
    grader="judge_factuality",
    metric="share of correct answers; incorrect and not attempted apart",
    licence="MIT",
    why="In the reference paper: does long-thought training make a model say more that is false? Not attempted is "
    "counted apart from incorrect, as its authors do; their grader's prompt is another than the one here.",
    source="github.com/openai/simple-evals; a copy in github.com/tavily-ai/tavily-SimpleQA",
)
