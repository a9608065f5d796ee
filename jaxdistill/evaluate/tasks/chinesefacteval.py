"""ChineseFactEval's general part, as the reference paper's authors published it: 251 questions with gold answers."""

from functools import partial

from jaxdistill.evaluate.tasks import Task, read_questions

TASK = Task(
    name="chinesefacteval",
    problems_from=partial(read_questions, licence="Apache-2.0", group="category"),
    prompt="{problem}",
    grader="judge_factuality",
    metric="share of correct answers; incorrect and not attempted apart",
    licence="Apache-2.0",
    why="In the reference paper, where long-thought training cost 6 points on 249 of these. Some answers change with "
    "time: they are a group of their own.",
    source="github.com/HuangZhen02/longCOT-example, data/hallucination",
)
