"""The three procedural problem families: how they are drawn, stated, read back from their text, and worked out.

All arithmetic is modulo 10, so that every single fact is a table of at most 100 entries that a model of a million
parameters learns in minutes, while the composition of all steps has far too many operands to be learnt in one jump.
The answer joins the last two values, which leaves 90 answers to guess among.
"""

import dataclasses
import hashlib
import random
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Literal

from jaxdistill.errors import UserError
from jaxdistill.records import Problem

Split = Literal["train", "heldout"]
Operands = tuple[int, ...]  # digits, in the order of the statement

HELDOUT_SHARE = 16  # one operand tuple of 16 is held out
_MISSES = 20_000  # draws in a row without a new problem after which a family counts as used up
_MULTIPLIERS = (3, 7, 9)  # units modulo 10: no value is ever lost, so a slip always reaches the answer


@dataclasses.dataclass(frozen=True)
class Fact:
    """One elementary operation modulo 10, such as 7 + 4 = 1."""

    left: int
    sign: str
    right: int

    @property
    def value(self) -> int:
        """The last digit of the result."""
        return _OPERATIONS[self.sign](self.left, self.right) % 10


_OPERATIONS: Mapping[str, Callable[[int, int], int]] = {
    "+": lambda left, right: left + right,
    "*": lambda left, right: left * right,
}


@dataclasses.dataclass(frozen=True)
class Family:
    """One kind of problem. `facts(operands, index)` is the work of one letter: signs and right operands."""

    name: str
    letters: str  # one step each, in order
    statement: Callable[[Operands], str]
    pattern: re.Pattern[str]
    draw: Callable[[random.Random], Operands]
    facts: Callable[[Operands, int], Iterator[tuple[str, int]]]
    folds: tuple[int, ...]  # letters per step of the coarse solution


@dataclasses.dataclass(frozen=True)
class Task:
    """A problem as its family understands it."""

    family: Family
    operands: Operands

    @property
    def start(self) -> int:
        """The value given."""
        return self.operands[0]

    def operand(self, index: int) -> int:
        """The digit that stands beside a letter in the statement."""
        return self.operands[index - len(self.family.letters)]

    def steps(self, slip: tuple[int, int] | None = None) -> list[tuple[list[Fact], int]]:
        """Facts and resulting value of each letter; `slip` = (letter index, wrong value written there)."""
        value, done = self.start, []
        for index in range(len(self.family.letters)):
            facts: list[Fact] = []
            for sign, right in self.family.facts(self.operands, index):
                facts.append(Fact(value, sign, right))
                value = facts[-1].value
            if slip is not None and slip[0] == index:
                value = slip[1]
            done.append((facts, value))
        return done

    @property
    def answer(self) -> str:
        """The last two values as one number."""
        return joined(self.steps())


def joined(steps: list[tuple[list[Fact], int]]) -> str:
    """The answer that a list of steps leads to."""
    return str(10 * steps[-2][1] + steps[-1][1])


def _labelled(letters: str, items: tuple[int, ...]) -> str:
    return ", ".join(f"{letter}{item}" for letter, item in zip(letters, items, strict=True))


def _digit_list(letters: str) -> str:
    return ", ".join(rf"{letter}(\d)" for letter in letters)


_ASK = "Write the last two values as one number."  # names no letter: each stands once in a problem, beside its operand
_TURNS, _DIGITS = "abcdef", "abcd"


def _turns_statement(operands: Operands) -> str:
    return (
        f"Work modulo 10. Start with {operands[0]}. Multiply and add in turn: {_labelled(_TURNS, operands[1:])}. {_ASK}"
    )


def _turns_draw(rng: random.Random) -> Operands:
    draws = (rng.choice(_MULTIPLIERS) if turn % 2 == 0 else rng.randrange(10) for turn in range(len(_TURNS)))
    return (rng.randrange(10), *draws)


def _turns_facts(operands: Operands, index: int) -> Iterator[tuple[str, int]]:
    yield "*+"[index % 2], operands[1 + index]


def _checksum_statement(operands: Operands) -> str:
    return (
        f"Work modulo 10. Start with {operands[0]}. At each letter multiply by {operands[1]} and add its digit: "
        f"{_labelled(_DIGITS, operands[2:])}. {_ASK}"
    )


def _checksum_draw(rng: random.Random) -> Operands:
    return (rng.randrange(10), rng.choice(_MULTIPLIERS), *(rng.randrange(10) for _ in _DIGITS))


def _checksum_facts(operands: Operands, index: int) -> Iterator[tuple[str, int]]:
    yield "*", operands[1]
    yield "+", operands[2 + index]


def _relay_statement(operands: Operands) -> str:
    return (
        f"Work modulo 10. Start with {operands[0]}. At each letter add its digit and multiply by {operands[1]}: "
        f"{_labelled(_DIGITS, operands[2:])}. {_ASK}"
    )


def _relay_facts(operands: Operands, index: int) -> Iterator[tuple[str, int]]:
    yield "+", operands[2 + index]
    yield "*", operands[1]


FAMILIES: Mapping[str, Family] = {
    family.name: family
    for family in (
        Family(
            name="turns",
            letters=_TURNS,
            statement=_turns_statement,
            pattern=re.compile(
                r"Work modulo 10\. Start with (\d)\. Multiply and add in turn: "
                + _digit_list(_TURNS)
                + re.escape(f". {_ASK}")
            ),
            draw=_turns_draw,
            facts=_turns_facts,
            folds=(4, 1, 1),
        ),
        Family(
            name="checksum",
            letters=_DIGITS,
            statement=_checksum_statement,
            pattern=re.compile(
                r"Work modulo 10\. Start with (\d)\. At each letter multiply by (\d) and add its digit: "
                + _digit_list(_DIGITS)
                + re.escape(f". {_ASK}")
            ),
            draw=_checksum_draw,
            facts=_checksum_facts,
            folds=(3, 1),
        ),
        Family(
            name="relay",
            letters=_DIGITS,
            statement=_relay_statement,
            pattern=re.compile(
                r"Work modulo 10\. Start with (\d)\. At each letter add its digit and multiply by (\d): "
                + _digit_list(_DIGITS)
                + re.escape(f". {_ASK}")
            ),
            draw=_checksum_draw,
            facts=_relay_facts,
            folds=(3, 1),
        ),
    )
}


def parse(text: str) -> Task | None:
    """The first problem stated in a text, or None where no family knows the words."""
    for family in FAMILIES.values():
        if match := family.pattern.search(text):
            return Task(family, tuple(int(digit) for digit in match.groups()))
    return None


def split_of(family: str, operands: Operands) -> Split:
    """The side a problem is on, decided by its operands alone: no seed moves a problem across."""
    digest = hashlib.sha256(repr((family, operands)).encode()).digest()
    return "heldout" if int.from_bytes(digest[:4], "big") % HELDOUT_SHARE == 0 else "train"


def terse_solution(task: Task) -> str:
    """What a problem source prints as its solution: the key values, nothing explained."""
    steps = task.steps()
    shown = [f"{task.family.letters[last]} {steps[last][1]}" for last in fold_ends(task.family)]
    return f"{', '.join(shown)}; {task.answer}"


def fold_ends(family: Family) -> list[int]:
    """Index of the last letter of each step of the coarse solution."""
    return [sum(family.folds[: count + 1]) - 1 for count in range(len(family.folds))]


def generate(family: str, count: int, seed: int, split: Split) -> list[Problem]:
    """Distinct problems of one family, or of `all` in turn; the same arguments give the same list.

    Problems whose answer would start with 0 are not drawn: the answer always has two digits.

    Raises:
      UserError: unknown family or split, or (nearly) all problems of a family are drawn and `count` is not reached.
    """
    if family != "all" and family not in FAMILIES:
        raise UserError(f"family {family!r} is not known; expected all or one of {sorted(FAMILIES)}")
    if split not in ("train", "heldout"):
        raise UserError(f"split {split!r} is not known; expected train or heldout")
    names = list(FAMILIES) if family == "all" else [family]
    rng = random.Random(f"{family}/{seed}/{split}")
    seen: set[tuple[str, Operands]] = set()
    problems: list[Problem] = []
    misses = 0  # draws in a row that gave nothing new
    while len(problems) < count:
        if misses == _MISSES:
            raise UserError(f"family {family!r} has no more than about {len(problems)} {split} problems, asked {count}")
        name = names[len(problems) % len(names)]
        task = Task(FAMILIES[name], FAMILIES[name].draw(rng))
        answer = task.answer
        if (name, task.operands) in seen or len(answer) < 2 or split_of(name, task.operands) != split:
            misses += 1
            continue
        misses = 0
        seen.add((name, task.operands))
        problems.append(_problem(task, answer, split))
    return problems


def _problem(task: Task, answer: str, split: Split) -> Problem:
    name = task.family.name
    return Problem(
        id=f"{name}-{''.join(str(operand) for operand in task.operands)}",
        problem=task.family.statement(task.operands),
        answer=answer,
        solution=terse_solution(task),
        source=f"jaxdistill.local_teacher/{name}",
        licence="Apache-2.0",
        meta={"family": name, "operands": list(task.operands), "split": split},
    )
