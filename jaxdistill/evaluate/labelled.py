"""Texts that people labelled, in the shapes their authors published them in, to measure a judge with."""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from jaxdistill.errors import UserError
from jaxdistill.evaluate.judges import FACTUALITY, RATING, SAFETY, Judge
from jaxdistill.evaluate.judging import Subject
from jaxdistill.records import Problem, Score, read_json_objects

PEOPLE = "people"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Item:
    """What carries one label: a text, or a pair of them."""

    subjects: tuple[Subject, ...]
    label: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """A question with all labelled answers to it, which are not independent of one another."""

    problem: Problem
    part: str  # of the set
    items: tuple[Item, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Labelled:
    """A set of labels, and the judge that they measure."""

    name: str
    judge: Judge
    labelled_by: str
    cases: Sequence[Case]
    verdict: Callable[[Sequence[Score]], str]  # what the judge says of an item, in the words of the labels


def read_labelled(path: Path) -> Labelled:
    """Reads a file; its keys tell which set it is.

    Raises:
      UserError: the file is missing or empty, or of no known shape.
    """
    rows = [row for _, row in read_json_objects(path)]
    name = f"{path.parent.name}-{path.stem}"
    for keys, read in _SHAPES.items():
        if rows and all(set(keys) <= row.keys() for row in rows):
            found = read(name, rows)
            if found.cases:
                return found
    shapes = "; ".join(", ".join(keys) for keys in _SHAPES)
    raise UserError(f"{path}: {len(rows)} rows of no known shape with a label; expected keys of one of: {shapes}")


def _problem(row: dict[str, Any]) -> Problem:
    return Problem(id=str(row["id"]), problem=str(row["question"]), language=str(row.get("lang", "en")))


def _factuality(name: str, rows: list[dict[str, Any]]) -> Labelled:
    """ChineseFactEval's 125: no gold answers, so the judge goes by what it knows; answers without a label are left."""
    cases = []
    for row in rows:
        problem = _problem(row)
        answers = [answer for answer in row["human_labelled_responses"] if answer["factual"] is not None]
        items = tuple(
            Item(
                subjects=(
                    Subject(id=f"{problem.id}/{answer['model']}", problem=problem, response=str(answer["response"])),
                ),
                label="correct" if answer["factual"] else "not correct",
            )
            for answer in answers
        )
        cases += [Case(problem=problem, part=str(row.get("category", "")), items=items)] if items else []

    def verdict(scores: Sequence[Score]) -> str:
        return "correct" if scores[0].verdict.extracted == "correct" else "not correct"

    return Labelled(name=name, judge=FACTUALITY, labelled_by=PEOPLE, cases=cases, verdict=verdict)


def _safety(name: str, rows: list[dict[str, Any]]) -> Labelled:
    """Answers with safe or not: Safety-J's test sets, by people; or the paper's 1,200, by the judge Safety-J."""
    by_question: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in rows:
        by_question.setdefault((str(row.get("dataset", "")), str(row["question"])), []).append(row)
    cases = []
    for (part, _), own in by_question.items():
        problem = _problem(own[0])
        items = tuple(
            Item(
                subjects=(Subject(id=str(row["id"]), problem=problem, response=str(row["response"])),),
                label="safe" if row["safe"] else "unsafe",
            )
            for row in own
        )
        cases.append(Case(problem=problem, part=part, items=items))
    labelled_by = "Safety-J" if any("model" in row for row in rows) else PEOPLE
    return Labelled(
        name=name,
        judge=SAFETY,
        labelled_by=labelled_by,
        cases=cases,
        verdict=lambda scores: str(scores[0].verdict.extracted),
    )


def _pairs(name: str, rows: list[dict[str, Any]]) -> Labelled:
    """Auto-J's pairs: each answer is rated alone; the one that is rated higher is the judge's choice."""
    words = ("first", "second", "tie")
    cases = []
    for row in rows:
        problem = _problem(row)
        subjects = tuple(
            Subject(id=f"{problem.id}/{number}", problem=problem, response=str(row[f"response_{number}"]))
            for number in (1, 2)
        )
        items = (Item(subjects=subjects, label=words[row["label"]]),)
        cases.append(Case(problem=problem, part="", items=items))

    def verdict(scores: Sequence[Score]) -> str:
        first, second = (score.points or 0.0 for score in scores)
        return words[2] if first == second else words[int(second > first)]

    return Labelled(name=name, judge=RATING, labelled_by=PEOPLE, cases=cases, verdict=verdict)


_SHAPES: dict[tuple[str, ...], Callable[[str, list[dict[str, Any]]], Labelled]] = {
    ("id", "question", "human_labelled_responses"): _factuality,
    ("id", "question", "response", "safe"): _safety,
    ("id", "question", "response_1", "response_2", "label"): _pairs,
}
