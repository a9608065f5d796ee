"""How good the curation rules, gates and checks are on real data, and how fast: `python benchmarks/curation.py`.

Reads shared/data beside the checkout and the hand-checked labels of tests/data; writes benchmarks/results/curate.md.
"""

import dataclasses
import json
import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from jaxdistill.curate.choices import find_choices, open_question
from jaxdistill.curate.contamination import read_evaluation_sets
from jaxdistill.curate.formats import read_row, to_problem
from jaxdistill.curate.rules import RULES
from jaxdistill.curate.run import CurateConfig
from jaxdistill.curate.text import tokens
from jaxdistill.records import Problem, read_json_objects

ROOT = Path(__file__).parents[1]
OVERLAP: float = CurateConfig.overlap
LABELS = ROOT / "tests" / "data"


@dataclasses.dataclass(frozen=True)
class Rate:
    """What a detector found, missed, and took for something it is not."""

    found: int
    missed: int
    wrong: int

    @property
    def precision(self) -> float:
        """Share of what was found that is right; 1 where nothing was found."""
        return self.found / (self.found + self.wrong) if self.found + self.wrong else 1.0

    @property
    def recall(self) -> float:
        """Share of what is there that was found; 1 where nothing is there."""
        return self.found / (self.found + self.missed) if self.found + self.missed else 1.0


def rate(pairs: Iterable[tuple[bool, bool]]) -> Rate:
    """Counts pairs of (said by the detector, true by the label)."""
    found = missed = wrong = 0
    for said, true in pairs:
        found += said and true
        missed += true and not said
        wrong += said and not true
    return Rate(found, missed, wrong)


def pool(shared: Path) -> dict[str, Problem]:
    """The raw pool by id."""
    rows = (values for _, values in read_json_objects(shared / "seed_pool/raw_pool.jsonl"))
    return {row["id"]: to_problem(read_row(row), row, row["id"]) for row in rows}


def labels(name: str) -> dict[str, list[str]]:
    """Hand-checked labels by row id."""
    return json.loads((LABELS / name).read_text(encoding="utf-8"))


def rule_rates(problems: Mapping[str, Problem], named: Mapping[str, list[str]]) -> dict[str, Rate]:
    """Precision and recall of each rule on the hand-checked rows, after choices were opened as `curate` does.

    `choices` says whether a row has options at all, `open_question` whether it can do without them; rows without an
    answer say nothing about the last, nor about answers that are no number.
    """
    rows = [(problems[name], set(kinds)) for name, kinds in named.items()]
    opened = [(open_question(problem) or problem, kinds) for problem, kinds in rows]
    answered = [(problem, kinds) for problem, kinds in rows if "no_answer" not in kinds]
    choice = {"convertible_choice", "unconvertible_choice"}

    def by(rule: str, label: str, some: Iterable[tuple[Problem, set[str]]]) -> Rate:
        return rate((RULES[rule](problem) is not None, label in kinds) for problem, kinds in some)

    return {
        "image": by("image", "image", opened),
        "no_answer": by("no_answer", "no_answer", opened),
        "proof": by("proof", "proof", opened),
        "choices": rate((find_choices(problem.problem) is not None, bool(kinds & choice)) for problem, kinds in rows),
        "open_question": rate(
            (open_question(problem) is not None, "convertible_choice" in kinds) for problem, kinds in answered
        ),
        "multiple_choice": by(
            "multiple_choice", "unconvertible_choice", [row for row in opened if "no_answer" not in row[1]]
        ),
        "not_numerical": by("not_numerical", "not_numerical", [row for row in opened if "no_answer" not in row[1]]),
        "incomplete": by("incomplete", "unanswerable", opened),
    }


def cut_statements(problems: Iterable[Problem]) -> Iterator[Problem]:
    """Statements that end in the middle, as a broken export leaves them: cut after 40% and after 70% of the words."""
    for problem in problems:
        words = problem.problem.split(" ")
        for share in (0.4, 0.7):
            if len(words) >= 12:
                yield dataclasses.replace(problem, problem=" ".join(words[: int(share * len(words))]))


EVALUATION_SETS = (
    "math500/math500.jsonl",
    "aime2024/aime2024.jsonl",
    "aime2025/aime2025.jsonl",
    "math2024/math2024.jsonl",
    "extra_math/amc23.jsonl",
    "extra_math/olymmath.jsonl",
    "gsm8k/test.jsonl",
)


def contamination(shared: Path) -> tuple[set[str], set[str]]:
    """Rows of the pool that are marked as contaminating, and those that are found, against all evaluation sets."""
    index = read_evaluation_sets([shared / name for name in EVALUATION_SETS], OVERLAP)
    rows = [values for _, values in read_json_objects(shared / "seed_pool/raw_pool.jsonl")]
    flagged = {row["id"] for row in rows if index.find(tokens(row["problem"]))}
    return {row["id"] for row in rows if row["contaminates"]}, flagged


def typeset_anew(text: str) -> str:
    """The statement as another source would typeset it: other delimiters, fractions, spaces, fonts and symbols."""
    for pattern, other in (
        (r"\\\[(.+?)\\\]", r"$$\1$$"),
        (r"(?<![$\\])\$([^$]+)\$(?!\$)", r"\\( \1 \\)"),
        (r"\\d?frac", r"\\tfrac"),
        (r"\\left|\\right", ""),
        (r"\\leq?(?![a-z])", "≤"),
        (r"\\geq?(?![a-z])", "≥"),
        (r"\\cdot(?![a-z])", r"\\times"),
        (r"\\[cl]?dots", "..."),
        (r"\^\{?\\circ\}?", "°"),
        (r"(?<=[a-z]), (?=[a-z])", ",  "),
        (r"\\(?:text|mathrm)\{([^{}]*)\}", r"\\mbox{\1}"),
        (r"(?<=\d)(?=\d{3}(?!\d))(?<!\d{5})(?<![.\d]\d)", "{,}"),
    ):
        text = re.sub(pattern, other, text, flags=re.DOTALL)
    return " ".join(text.split())


def retypeset(shared: Path) -> tuple[int, int]:
    """How many problems of MATH-500 and AIME 2024 are found once they are typeset anew, and of how many."""
    paths = [shared / name for name in EVALUATION_SETS[:2]]
    index = read_evaluation_sets(paths, OVERLAP)
    texts = [values["problem"] for path in paths for _, values in read_json_objects(path)]
    return sum(index.find(tokens(typeset_anew(text))) is not None for text in texts), len(texts)


if __name__ == "__main__":
    sys.exit("not yet")
