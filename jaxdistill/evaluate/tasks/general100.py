"""The reference paper's 100 general prompts: 50 after LIMA, 50 after Auto-J."""

from functools import partial

from jaxdistill.evaluate.tasks import Task, read_questions

TASK = Task(
    name="general100",
    problems_from=partial(read_questions, licence="Apache-2.0", group="dataset_inferred", answers=False),
    prompt="{problem}",
    grader="judge_rating",
    metric="mean rating from 0 to 100",
    licence="Apache-2.0",
    why="Does a model that was taught mathematics still write, plan and explain? The paper's ratings are those of "
    "three experts and are not published one by one; a judge's are no substitute.",
    source="github.com/HuangZhen02/longCOT-example, data/lima_and_auto_j",
)
