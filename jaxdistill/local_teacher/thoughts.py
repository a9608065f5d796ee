"""The teacher's texts: long thoughts (right, or wrong to the end), and coarse step-by-step solutions.

A long thought works out every elementary fact with its operands in sight; a coarse solution states only every third
value. That difference is what the demo's two phases are there to show.
"""

import dataclasses
import random
import re

from jaxdistill.local_teacher.problems import Fact, Task, fold_ends, joined


@dataclasses.dataclass(frozen=True)
class Thought:
    """An answer as reasoning servers return it: the thought and the final words apart."""

    reasoning: str
    content: str


UNKNOWN = "I do not know how to solve this problem."


def long_thought(task: Task, rng: random.Random, *, wrong_turn_rate: float = 0.15, wrong: bool = False) -> Thought:
    """Plan, one line a letter, a check, the boxed answer.

    Args:
      wrong_turn_rate: share of thoughts with one slip that is noticed at once and repaired.
      wrong: one slip goes unnoticed, everything after it is consistent with it, and the answer is wrong.
    """
    letters = task.family.letters
    index, slip_value = _slip(task, rng)
    wrong_turn = not wrong and rng.random() < wrong_turn_rate
    steps = task.steps(slip=(index, slip_value) if wrong else None)
    lines = ["Plan: one letter at a time."]
    for i, (letter, (facts, result)) in enumerate(zip(letters, steps, strict=True)):
        # Letter and operand come first, as they stand in the problem: one look-up finds the operand, and all that
        # follows is in this line and the one before. "+ 4" instead of "4" cost a small model its copy of the digit.
        work = _work(facts, result)
        if wrong_turn and i == index:
            work = f"{_work(facts, slip_value)}. Wait, {_work(facts[-1:], result)}"
        lines.append(f"{letter}{task.operand(i)}: {work}.")
    facts, result = steps[-1]
    lines.append(f"Check: {_work(facts[-1:], result)}, right.")
    lines.append(f"Last values: {steps[-2][1]}, {result}.")
    return Thought("\n".join(lines), f"The answer is \\boxed{{{joined(steps)}}}.")


def _slip(task: Task, rng: random.Random) -> tuple[int, int]:
    """A letter's index and a value that is not its own; every later pair of values differs too."""
    index = rng.randrange(len(task.family.letters))
    return index, (task.steps()[index][1] + rng.randrange(1, 10)) % 10


def _work(facts: list[Fact], result: int) -> str:
    """`7*3=1, 1+4=5`, with `result` written after the last sign of equality."""
    values = [*(fact.value for fact in facts[:-1]), result]
    return ", ".join(f"{f.left}{f.sign}{f.right}={value}" for f, value in zip(facts, values, strict=True))


def reformatted(task: Task, rng: random.Random | None = None) -> str:
    """The coarse solution in full sentences: longer than the source's, with the work between its values left out.

    With `rng` it holds one slip drawn from it, and its answer is wrong.
    """
    letters = task.family.letters
    steps = task.steps(slip=_slip(task, rng) if rng is not None else None)
    lines, first = [], 0
    for number, last in enumerate(fold_ends(task.family), start=1):
        names = list(letters[first : last + 1])
        listed = f"{', '.join(names[:-1])} and {names[-1]}" if len(names) > 1 else names[0]
        begin = f"we start with {task.start} and" if number == 1 else "we"
        lines.append(f"Step {number}: {begin} apply {listed}, which gives {steps[last][1]}.")
        first = last + 1
    lines.append(f"The last values are {steps[-2][1]} and {steps[-1][1]}, so the answer is \\boxed{{{joined(steps)}}}.")
    return "\n".join(lines)


def review(task: Task, text: str) -> str:
    """Names the first of the numbered steps in a text whose value is wrong, or none."""
    for index, (letter, (facts, result)) in enumerate(zip(task.family.letters, task.steps(), strict=True)):
        label = f"{letter}{task.operand(index)}: "
        step = re.search(rf"^(\d+)\. {label}.*(\d)\.$", text, re.MULTILINE)
        if step and int(step[2]) != result:
            return f"Wait, {label}should be {_work(facts, result)}.\nStep: {step[1]}"
    return "I worked each step again and came to the same values.\nStep: none"


def after_numbered(text: str, thought: Thought) -> Thought:
    """A thought without its first lines: as many as the text holds numbered ones."""
    held = len(re.findall(r"^\d+\. ", text, re.MULTILINE))
    return Thought("\n".join(thought.reasoning.splitlines()[held:]), thought.content)


_TOKEN = re.compile(r"\d|[^\W\d]+|[^\w\s]|_")


def count_tokens(text: str) -> int:
    """Words, single digits and marks: the teacher's own unit for usage and limits."""
    return len(_TOKEN.findall(text))


def first_tokens(text: str, count: int) -> str:
    """The text up to and including its first `count` tokens."""
    matches = list(_TOKEN.finditer(text))[:count]
    return text if len(matches) < count else text[: matches[-1].end()] if matches else ""
