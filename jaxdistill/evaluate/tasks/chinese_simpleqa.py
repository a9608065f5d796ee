"""Chinese SimpleQA: 3,000 short questions about what is known in Chinese, six topics."""

from functools import partial

from jaxdistill.evaluate.tasks import Task, read_questions

TASK = Task(
    name="chinese_simpleqa",
    problems_from=partial(read_questions, licence="MIT", group="topic"),
    prompt="{problem}",
    grader="judge_factuality",
    metric="share of correct answers; incorrect and not attempted apart",
    licence="MIT",
    why="SimpleQA in the other language of the reference paper, about other things: it is no translation.",
    source="github.com/OpenStellarTeam/ChineseSimpleQA, data/chinese_simpleqa.jsonl",
)
