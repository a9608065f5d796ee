"""Problem families and the teacher's texts, against arithmetic written anew here."""

import collections
import random
import re

import pytest

from jaxdistill.errors import UserError
from jaxdistill.local_teacher.problems import FAMILIES, Task, generate, parse, split_of
from jaxdistill.local_teacher.thoughts import count_tokens, first_tokens, long_thought, reformatted
from jaxdistill.records import Problem

SPACE = {"turns": 10 * 10**3 * 3**3, "checksum": 10 * 3 * 10**4, "relay": 10 * 3 * 10**4}  # distinct operand tuples


def values_of(statement: str) -> list[int]:
    """All values of a problem, worked out from its words alone."""
    values = [int(statement.split("Start with ")[1][0])]
    work = statement.split(": ")[1].split(". Write")[0]
    for index, item in enumerate(work.split(", ")):
        operand = int(item[-1])
        if "in turn" in statement:
            values.append((values[-1] + operand if index % 2 else values[-1] * operand) % 10)
            continue
        multiplier = int(re.findall(r"multiply by (\d)", statement)[0])
        add_first = statement.index("add its") < statement.index("multiply by")
        values.append(((values[-1] + operand) * multiplier if add_first else values[-1] * multiplier + operand) % 10)
    return values


def task_of(problem: Problem) -> Task:
    task = parse(f"Please solve this.\n\n{problem.problem}\nThank you.")
    assert task is not None
    return task


def check_arithmetic(text: str) -> None:
    """Every a + b = c of a text holds modulo 10."""
    facts = re.findall(r"(\d)([+*])(\d)=(\d)", text)
    assert facts
    for left, sign, right, value in facts:
        a, b = int(left), int(right)
        assert {"+": a + b, "*": a * b}[sign] % 10 == int(value), (left, sign, right, value)


@pytest.mark.parametrize("family", FAMILIES)
def test_families_are_large_distinct_and_right(family: str):
    problems = generate(family, 800, seed=0, split="train")
    assert SPACE[family] > 100_000
    assert len({tuple(p.meta["operands"]) for p in problems}) == len({p.id for p in problems}) == 800
    assert problems == generate(family, 800, seed=0, split="train")
    for problem in problems:
        values = values_of(problem.problem)
        assert problem.answer == f"{values[-2]}{values[-1]}"
        assert problem.solution is not None
        assert problem.solution.endswith(f"; {problem.answer}")
        assert task_of(problem).operands == tuple(problem.meta["operands"])
        assert len(values) - 1 >= 4


@pytest.mark.parametrize("family", [*FAMILIES, "all"])
def test_heldout_operands_are_never_trained_on(family: str):
    train = {(p.meta["family"], *p.meta["operands"]) for s in range(2) for p in generate(family, 700, s, "train")}
    heldout = {(p.meta["family"], *p.meta["operands"]) for s in range(2) for p in generate(family, 100, s, "heldout")}
    assert not train & heldout
    assert {split_of(name, tuple(operands)) for name, *operands in heldout} == {"heldout"}


def test_all_takes_families_in_turn_and_answers_are_spread():
    problems = generate("all", 1500, seed=4, split="train")
    assert [p.meta["family"] for p in problems[:3]] == list(FAMILIES)

    for family in FAMILIES:
        counts = collections.Counter(p.answer for p in problems if p.meta["family"] == family)
        assert len(counts) > 80
        assert max(counts.values()) < 0.05 * counts.total()


@pytest.mark.parametrize("family", FAMILIES)
def test_thoughts_are_right_and_wrong_turns_are_repaired(family: str):
    rng = random.Random(0)
    turns = 0
    for problem in generate(family, 400, seed=1, split="train"):
        thought = long_thought(task_of(problem), rng, wrong_turn_rate=0.15)
        values = values_of(problem.problem)
        lines = thought.reasoning.splitlines()
        assert lines[0].startswith("Plan")
        assert lines[-2].startswith("Check")
        assert [int(re.findall(r"=(\d)", line)[-1]) for line in lines[1:-2]] == values[-(len(lines) - 3) :]
        turned = [line for line in lines if "Wait" in line]
        turns += len(turned)
        for line in turned:
            slip, repair = line.split("Wait, ")
            assert slip[-3] != re.findall(r"=(\d)", repair)[-1]
        check_arithmetic("\n".join(line.split("Wait, ")[-1] for line in lines))
        assert thought.content == f"The answer is \\boxed{{{problem.answer}}}."
        assert 60 <= count_tokens(thought.reasoning + thought.content) <= 130
    assert 35 < turns < 90


@pytest.mark.parametrize("family", FAMILIES)
def test_coarse_solutions_are_right_longer_than_the_source_and_skip_values(family: str):
    for problem in generate(family, 250, seed=2, split="train"):
        text, values = reformatted(task_of(problem)), values_of(problem.problem)
        assert text.endswith(f"\\boxed{{{problem.answer}}}.")
        given = [int(digit) for digit in re.findall(r"gives (\d)\.", text)]
        assert given == values[-len(given) :]
        assert len(given) < len(values) - 1
        assert len(text) > len(problem.solution or "")


@pytest.mark.parametrize("family", FAMILIES)
def test_wrong_answers_are_wrong(family: str):
    rng = random.Random(3)
    for problem in generate(family, 250, seed=3, split="train"):
        task = task_of(problem)
        for text in (long_thought(task, rng, wrong=True).content, reformatted(task, rng)):
            assert f"\\boxed{{{problem.answer}}}" not in text
            assert "\\boxed{" in text


def test_unknown_text_and_arguments():
    assert parse("What is 2 + 2?") is None
    with pytest.raises(UserError, match="family 'sums'"):
        generate("sums", 1, 0, "train")


def test_asking_for_more_than_there_is_ends(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("jaxdistill.local_teacher.problems._MISSES", 15)
    with pytest.raises(UserError, match="no more than about"):
        generate("checksum", 20_000, 0, "heldout")


def test_first_tokens_counts_digits_one_by_one():
    assert count_tokens("a 12: \\boxed{37}.") == 11
    assert first_tokens("a 12: done", 3) == "a 12"
    assert first_tokens("a 12", 9) == "a 12"
    assert first_tokens("a 12", 0) == ""
