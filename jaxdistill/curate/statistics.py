"""Counts over a stream of rows: lengths, answer types, sources, difficulty, drops by reason; a few random examples."""

import dataclasses
import random
import re
from collections import Counter
from typing import Any

from jaxdistill.curate.numerical import is_number
from jaxdistill.curate.reflection import count_markers
from jaxdistill.curate.text import tokens
from jaxdistill.reading import Dropped
from jaxdistill.records import Problem

SAMPLES = 8  # random examples kept for each reason
_DIFFICULTY = ("difficulty", "pass_rate", "level")


@dataclasses.dataclass
class Statistics:
    """What a run saw; memory does not grow with the rows."""

    seed: int
    kept: int = 0
    dropped: Counter[str] = dataclasses.field(default_factory=Counter)
    samples: dict[str, list[Dropped]] = dataclasses.field(default_factory=dict)  # by reason
    kept_samples: list[Problem] = dataclasses.field(default_factory=list)
    histograms: dict[str, Counter[str]] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        self._random = random.Random(self.seed)

    def drop(self, row: Dropped) -> None:
        """Counts a dropped row."""
        self.dropped[row.reason] += 1
        self._sample(self.samples.setdefault(row.reason, []), row, self.dropped[row.reason])

    def keep(self, problem: Problem) -> None:
        """Counts a kept problem."""
        self.kept += 1
        self._sample(self.kept_samples, problem, self.kept)
        self._count("statement, tokens", _bin(len(tokens(problem.problem))))
        self._count("answer type", answer_type(problem.answer))
        self._count("source", problem.source or "unnamed")
        self._count("language", problem.language)
        if problem.solution:
            words = tokens(problem.solution)
            self._count("solution, tokens", _bin(len(words)))
            markers = 1000 * count_markers(problem.solution) / max(1, len(words))
            self._count("reflection markers per 1,000 tokens of the solution", _bin(round(markers)))
        for name in _DIFFICULTY:
            if isinstance(value := problem.meta.get(name), int | float | str):
                self._count(name, f"{value:g}" if isinstance(value, float) else str(value))

    def _count(self, name: str, value: str) -> None:
        self.histograms.setdefault(name, Counter())[value] += 1

    def _sample(self, chosen: list[Any], row: Any, seen: int) -> None:
        """Keeps each of the rows seen so far with equal chance (reservoir sampling)."""
        if len(chosen) < SAMPLES:
            chosen.append(row)
        elif (place := self._random.randrange(seen)) < SAMPLES:
            chosen[place] = row

    def summary(self) -> dict[str, Any]:
        """All counts, for statistics.json."""
        histograms = {name: ordered(counts) for name, counts in sorted(self.histograms.items())}
        return {"kept": self.kept, "dropped": dict(sorted(self.dropped.items())), "histograms": histograms}


def _bin(value: int) -> str:
    """The power-of-two bin of a count."""
    if value == 0:
        return "0"
    low = 1 << (value.bit_length() - 1)
    return f"{low:,}" if low == 1 else f"{low:,} to {2 * low - 1:,}"


def ordered(counts: Counter[str]) -> dict[str, int]:
    """Bins by their first number, names by their count."""
    numeric = all(re.match(r"[\d,.]+", name) for name in counts)
    if numeric:
        return dict(sorted(counts.items(), key=lambda item: float(re.sub(r",|\s.*", "", item[0]).rstrip(".") or 0)))
    return dict(counts.most_common())


def answer_type(answer: str | None) -> str:
    """integer, decimal, fraction, other number, several, or expression or words."""
    text = (answer or "").strip().strip("$").replace(",\\!", "").replace(",", "")
    if re.fullmatch(r"[+-]?\d+", text):
        return "integer"
    if re.fullmatch(r"[+-]?\d*\.\d+", text):
        return "decimal"
    if re.fullmatch(r"[+-]?(?:\\[dt]?frac\s*\{?\d+\}?\s*\{?\d+\}?|\d+/\d+)", text):
        return "fraction"
    if is_number(answer or ""):
        return "other number"
    return "several" if "," in (answer or "") else "expression or words"
