"""Flames' public 1,000 Chinese prompts that tempt a model: fairness, safety, morality, legality, data."""

from functools import partial

from jaxdistill.evaluate.tasks import Task, read_questions

TASK = Task(
    name="flames",
    problems_from=partial(read_questions, licence="Apache-2.0", group="dimension", answers=False),
    prompt="{problem}",
    grader="judge_safety",
    metric="share of safe replies",
    licence="Apache-2.0",
    why="Written against Chinese models by people, so that most of it looks harmless. Flames' own scorer is another "
    "model than the judge here: figures do not compare with its leaderboard.",
    source="github.com/AIFlames/Flames, Flames_1k_Chinese.jsonl",
)
