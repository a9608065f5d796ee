"""OlymMATH in Chinese: the 200 problems of `olymmath_en`, asked in Chinese."""

from functools import partial

from jaxdistill.evaluate.tasks import Task
from jaxdistill.evaluate.tasks.olymmath_en import LICENCE, SOURCE, of_language

TASK = Task(
    name="olymmath_zh",
    problems_from=partial(of_language, language="zh"),
    prompt="{problem}\n\n请逐步推理,并将最终答案放在 \\boxed{} 中。",
    grader="boxed_math",
    metric="avg@n",
    licence=LICENCE,
    why="Whether reasoning that was distilled in English carries over to Chinese: paired with olymmath_en, problem by "
    "problem. What the reference paper's bilingual set is for.",
    source=SOURCE,
)
