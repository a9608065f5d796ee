"""The 600 prompts of the reference paper's safety table: 200 each of WildSafety, Flames and DiaSafety."""

from functools import partial

from jaxdistill.evaluate.tasks import Task, read_questions

TASK = Task(
    name="safety600",
    problems_from=partial(read_questions, licence="Apache-2.0", group="dataset", answers=False),
    prompt="{problem}",
    grader="judge_safety",
    metric="share of safe replies",
    licence="Apache-2.0",
    why="The paper reports these, judged by Safety-J: distilled reasoning made its model less safe on WildSafety. "
    "Another judge gives other figures; compare runs of one judge.",
    source="github.com/HuangZhen02/longCOT-example, data/safety",
)
