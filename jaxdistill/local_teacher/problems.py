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
Operands = tuple[int | str, ...]  # digits, and for `keys` operations such as "*3"

HELDOUT_SHARE = 16  # one operand tuple of 16 is held out
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
    """One kind of problem. `facts(operands, values, index)` is the work of one letter, given all values so far."""

    name: str
    letters: str  # one step each, in order
    start_count: int  # values given at the start
    statement: Callable[[Operands], str]
    pattern: re.Pattern[str]
    draw: Callable[[random.Random], Operands]
    read: Callable[[re.Match[str]], Operands]
    facts: Callable[[Operands, list[int], int], Iterator[tuple[str, int]]]
    folds: tuple[int, ...]  # letters per step of the coarse solution


@dataclasses.dataclass(frozen=True)
class Task:
    """A problem as its family understands it."""

    family: Family
    operands: Operands

    @property
    def start(self) -> tuple[int, ...]:
        """The values given."""
        return tuple(int(operand) for operand in self.operands[: self.family.start_count])

    def steps(self, slip: tuple[int, int] | None = None) -> list[tuple[list[Fact], int]]:
        """Facts and resulting value of each letter; `slip` = (letter index, wrong value written there)."""
        values, done = list(self.start), []
        for index in range(len(self.family.letters)):
            facts: list[Fact] = []
            value = values[-1]
            for sign, right in self.family.facts(self.operands, values, index):
                facts.append(Fact(value, sign, right))
                value = facts[-1].value
            if slip is not None and slip[0] == index:
                value = slip[1]
            values.append(value)
            done.append((facts, value))
        return done

    @property
    def answer(self) -> str:
        """The last two values as one number."""
        return joined(self.steps())


def joined(steps: list[tuple[list[Fact], int]]) -> str:
    """The answer that a list of steps leads to."""
    return str(10 * steps[-2][1] + steps[-1][1])


def _labelled(letters: str, items: tuple[int | str, ...]) -> str:
    return ", ".join(f"{letter} {item}" for letter, item in zip(letters, items, strict=True))


def _digit_list(letters: str) -> str:
    return ", ".join(rf"{letter} (\d)" for letter in letters)


_ASK = "Write the last two values as one number."  # names no letter: each stands once in a problem, beside its operand
_KEYS, _DIGITS = "abcdef", "abcd"


def _keys_statement(operands: Operands) -> str:
    keys = tuple(f"{str(key)[0]} {str(key)[1]}" for key in operands[1:])
    return f"Work modulo 10. Start with {operands[0]}. Apply {_labelled(_KEYS, keys)}. {_ASK}"


def _keys_draw(rng: random.Random) -> Operands:
    signs = [rng.choice("+*") for _ in _KEYS]
    return (
        rng.randrange(10),
        *(f"{s}{rng.choice(_MULTIPLIERS) if s == '*' else rng.randrange(1, 10)}" for s in signs),
    )


def _keys_facts(operands: Operands, values: list[int], index: int) -> Iterator[tuple[str, int]]:
    key = str(operands[1 + index])
    yield key[0], int(key[1])


def _checksum_statement(operands: Operands) -> str:
    return (
        f"Work modulo 10. Start with {operands[0]}. At each letter multiply by {operands[1]} and add its digit: "
        f"{_labelled(_DIGITS, operands[2:])}. {_ASK}"
    )


def _checksum_draw(rng: random.Random) -> Operands:
    return (rng.randrange(10), rng.choice(_MULTIPLIERS), *(rng.randrange(10) for _ in _DIGITS))


def _checksum_facts(operands: Operands, values: list[int], index: int) -> Iterator[tuple[str, int]]:
    yield "*", int(operands[1])
    yield "+", int(operands[2 + index])


def _series_statement(operands: Operands) -> str:
    return (
        f"Work modulo 10. Start with {operands[0]} and {operands[1]}. At each letter add the last two values "
        f"and its digit: {_labelled(_DIGITS, operands[2:])}. {_ASK}"
    )


def _series_draw(rng: random.Random) -> Operands:
    return tuple(rng.randrange(10) for _ in range(2 + len(_DIGITS)))


def _series_facts(operands: Operands, values: list[int], index: int) -> Iterator[tuple[str, int]]:
    yield "+", values[-2]
    yield "+", int(operands[2 + index])


def _digits(match: re.Match[str]) -> Operands:
    return tuple(int(digit) for digit in match.groups())


FAMILIES: Mapping[str, Family] = {
    family.name: family
    for family in (
        Family(
            name="keys",
            letters=_KEYS,
            start_count=1,
            statement=_keys_statement,
            pattern=re.compile(
                r"Work modulo 10\. Start with (\d)\. Apply "
                + ", ".join(rf"{letter} ([+*] \d)" for letter in _KEYS)
                + re.escape(f". {_ASK}")
            ),
            draw=_keys_draw,
            read=lambda match: (int(match[1]), *(key.replace(" ", "") for key in match.groups()[1:])),
            facts=_keys_facts,
            folds=(4, 1, 1),
        ),
        Family(
            name="checksum",
            letters=_DIGITS,
            start_count=1,
            statement=_checksum_statement,
            pattern=re.compile(
                r"Work modulo 10\. Start with (\d)\. At each letter multiply by (\d) and add its digit: "
                + _digit_list(_DIGITS)
                + re.escape(f". {_ASK}")
            ),
            draw=_checksum_draw,
            read=_digits,
            facts=_checksum_facts,
            folds=(3, 1),
        ),
        Family(
            name="series",
            letters=_DIGITS,
            start_count=2,
            statement=_series_statement,
            pattern=re.compile(
                r"Work modulo 10\. Start with (\d) and (\d)\. At each letter add the last two values "
                r"and its digit: " + _digit_list(_DIGITS) + re.escape(f". {_ASK}")
            ),
            draw=_series_draw,
            read=_digits,
            facts=_series_facts,
            folds=(3, 1),
        ),
    )
}


def parse(text: str) -> Task | None:
    """The first problem stated in a text, or None where no family knows the words."""
    for family in FAMILIES.values():
        if match := family.pattern.search(text):
            return Task(family, family.read(match))
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
    """
    if family != "all" and family not in FAMILIES:
        raise UserError(f"family {family!r} is not known; expected all or one of {sorted(FAMILIES)}")
    if split not in ("train", "heldout"):
        raise UserError(f"split {split!r} is not known; expected train or heldout")
    names = list(FAMILIES) if family == "all" else [family]
    rng = random.Random(f"{family}/{seed}/{split}")
    seen: set[tuple[str, Operands]] = set()
    problems: list[Problem] = []
    while len(problems) < count:
        name = names[len(problems) % len(names)]
        task = Task(FAMILIES[name], FAMILIES[name].draw(rng))
        answer = task.answer
        if (name, task.operands) in seen or len(answer) < 2 or split_of(name, task.operands) != split:
            continue
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
