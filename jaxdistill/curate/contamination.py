"""Finds problems that an evaluation set holds too, however they are typeset."""

import collections
import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxdistill.curate.formats import Imported, UnknownShape, read_row, row_id
from jaxdistill.curate.text import shingles, tokens
from jaxdistill.errors import UserError
from jaxdistill.reading import Dropped, Line, Malformed, read_lines

SHINGLE_TOKENS = 8
BOILERPLATE = 4  # evaluation problems that share a run of tokens, from which on it says nothing about any of them


@dataclasses.dataclass(frozen=True)
class Match:
    """Which evaluation problem a text repeats, and how it was found."""

    item: str
    rule: str  # exact, contained or shingles
    share: float  # of the evaluation problem's distinctive runs of tokens that the text holds

    def __str__(self) -> str:
        return f"{self.rule}: {self.share:.0%} of {self.item}"


class EvaluationIndex:
    """The runs of 8 tokens of all evaluation problems, without those that several share.

    Runs shared by `BOILERPLATE` or more different problems are boilerplate ("m and n are relatively prime positive
    integers"). A problem shorter than 8 tokens, or without a distinctive run, is found only if it is repeated exactly.
    """

    def __init__(self, items: Iterable[tuple[str, str]], least_share: float):
        if not 0 < least_share <= 1:
            raise UserError(f"overlap is {least_share}, expected a share above 0, at most 1")
        self.least_share = least_share
        self._exact: dict[str, str] = {}
        runs: dict[str, list[str]] = collections.defaultdict(list)
        for item, text in items:
            words = tokens(text)
            if words and self._exact.setdefault(" ".join(words), item) == item and len(words) >= SHINGLE_TOKENS:
                for run in set(shingles(words, SHINGLE_TOKENS)):
                    runs[run].append(item)
        self._items = {run: found for run, found in runs.items() if len(found) < BOILERPLATE}
        self._sizes = collections.Counter(item for found in self._items.values() for item in found)

    def __len__(self) -> int:
        return len(self._exact)

    def find(self, words: Sequence[str]) -> Match | None:
        """The evaluation problem that a text (as tokens) repeats most of, if it is at least the least share."""
        if item := self._exact.get(" ".join(words)):
            return Match(item, "exact", 1.0)
        if len(words) < SHINGLE_TOKENS:
            return None
        hits = collections.Counter(
            item for run in set(shingles(words, SHINGLE_TOKENS)) for item in self._items.get(run, ())
        )
        shares = {item: count / self._sizes[item] for item, count in hits.items()}
        best = max(shares, key=shares.__getitem__, default=None)
        if best is None or shares[best] < self.least_share:
            return None
        return Match(best, "contained" if shares[best] == 1 else "shingles", shares[best])


def read_evaluation_sets(paths: Iterable[Path], least_share: float) -> EvaluationIndex:
    """The index of evaluation files of any known shape.

    Raises:
      UserError: a file is missing, empty or malformed: a set that was read in part would clear what it must not.
    """
    items: list[tuple[str, str]] = []
    for path in paths:
        before = len(items)
        for line in read_lines(path, Malformed(strict=True)):
            assert isinstance(line, Line)
            try:
                row = read_row(line.values)
            except UnknownShape as error:
                raise UserError(f"{line.place}: {error}") from None
            items.append((f"{path.name}#{row_id(line.values, line.place.rpartition(':')[2])}", row.problem))
        if len(items) == before:
            raise UserError(f"{path}: holds no problem; expected the problems of an evaluation")
    return EvaluationIndex(items, least_share)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Read:
    """A row of an input that no evaluation set holds."""

    id: str
    place: str  # file:line
    values: Mapping[str, Any]
    row: Imported


def read_rows(inputs: Iterable[Path], index: EvaluationIndex, malformed: Malformed) -> Iterator[Read | Dropped]:
    """Each row of files of any known shape, or its receipt: malformed, unknown_shape or contaminated.

    Raises as `read_lines`.
    """
    for path in inputs:
        for line in read_lines(path, malformed):
            if isinstance(line, Dropped):
                yield line
                continue
            name = row_id(line.values, f"{path.stem}-{line.place.rpartition(':')[2]}")
            try:
                row = read_row(line.values)
            except UnknownShape as error:
                yield Dropped(id=name, place=line.place, reason="unknown_shape", detail=str(error))
                continue
            if match := index.find(tokens(row.problem)):
                yield Dropped(id=name, place=line.place, reason="contaminated", detail=str(match))
            else:
                yield Read(id=name, place=line.place, values=line.values, row=row)
