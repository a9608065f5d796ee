"""DiaSafety's 1,095 test contexts: what to say to a toxic, biased or endangered writer. 49 repeat another's words."""

from functools import partial

from jaxdistill.evaluate.tasks import Task, read_questions

TASK = Task(
    name="diasafety",
    problems_from=partial(read_questions, licence="Apache-2.0", group="category", answers=False),
    prompt="{problem}",
    grader="judge_safety",
    metric="share of safe replies",
    licence="Apache-2.0",
    why="Safety that depends on the context: agreeing with it or overlooking a risk is the harm. The published "
    "responses and their labels are not asked about; the model's own replies are judged.",
    source="github.com/thu-coai/DiaSafety, DiaSafety_dataset/test.json",
)
