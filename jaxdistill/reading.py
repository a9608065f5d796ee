"""Reads rows that others wrote: a malformed line is told, counted and left out, and never stops the rest by itself."""

import array
import dataclasses
import itertools
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np

from jaxdistill import sources
from jaxdistill.errors import RunError, UserError
from jaxdistill.progress import say
from jaxdistill.records import Chain, Example, from_dict, read_json_lines

_TOLD = 10  # malformed lines that a command tells one by one; all are counted

Row = TypeVar("Row")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Dropped:
    """The receipt of a row that is not in the result."""

    id: str
    place: str  # file:line of the input
    reason: str
    detail: str


@dataclasses.dataclass(frozen=True)
class Line:
    """One line that holds a JSON object."""

    place: str  # file:line
    values: Mapping[str, Any]


class Malformed:
    """The malformed lines that a command met: it tells the first ones and counts all, or ends at the first."""

    def __init__(self, strict: bool = False, told: int = _TOLD):
        self.strict, self.count, self._told = strict, 0, told

    def take(self, place: str, what: str) -> Dropped:
        """The receipt of one.

        Raises:
          UserError: `strict`.
        """
        if self.strict:
            raise UserError(f"{place}: malformed: {what}; mend the line, or leave out --strict")
        self.count += 1
        if self.count <= self._told:
            say(f"malformed: {place}: {what[:300]}")
        elif self.count == self._told + 1 > 1:
            say("malformed: further lines are counted, and told no more")
        return Dropped(id=place, place=place, reason="malformed", detail=what[:300])

    @property
    def counts(self) -> dict[str, int]:
        """For a manifest; empty where there was none."""
        return {"malformed": self.count} if self.count else {}


def read_lines(path: Path, malformed: Malformed) -> Iterator[Line | Dropped]:
    """Yields each line's object, or the receipt of a line that holds none; one line is in memory at a time.

    Raises:
      UserError: there is no such file, or a line is malformed and that is to end the command.
    """
    for number, values in read_json_lines(path):
        place = f"{sources.name(path)}:{number}"
        yield malformed.take(place, values) if isinstance(values, str) else Line(place, values)


def read_rows(
    path: Path, row_type: type[Row], malformed: Malformed, wrong: Callable[[Row], str | None] = lambda _: None
) -> Iterator[Row | Dropped]:
    """Yields each line as a row, or its receipt; one line is in memory at a time.

    Args:
      wrong: what a command misses in a row that has the right fields, None where it can be used.

    Raises: as `read_lines`.
    """
    for line in read_lines(path, malformed):
        if isinstance(line, Dropped):
            yield line
            continue
        try:
            row = from_dict(line.values, row_type, line.place)
        except UserError as error:
            yield malformed.take(line.place, f"{error}".removeprefix(f"{line.place}: "))
            continue
        yield row if (found := wrong(row)) is None else malformed.take(line.place, found)


def not_spoken(one: Chain | Example) -> str | None:
    """What is missing from a conversation: a message, or what one needs."""
    if not one.messages:
        return "it has no messages; expected at least one"
    for turn, message in enumerate(one.messages):
        if not {"role", "content"} <= message.keys():
            return f"message {turn} has {sorted(message)}; expected role and content"
    return None


def check_kept(kept: int, counts: Mapping[str, int], receipts: Path | None = None) -> None:
    """Ends a command whose result is empty, once all is written; `counts` says why, by reason.

    Raises:
      RunError: nothing was kept.
    """
    if kept:
        return
    reasons = sorted(((count, name) for name, count in counts.items() if count), reverse=True)
    why = ", ".join(f"{count} {name}" for count, name in reasons[:3]) or "there were no rows"
    where = f"; {receipts} has the reason of each" if receipts and reasons else ""
    raise RunError(f"nothing was kept, most often because of: {why}{where}")


class Rows(Generic[Row]):
    """The rows of a file that are well-formed and wanted, read anew by each iteration.

    Memory: one row; 8 bytes for each where ids are to be unique. The malformed lines are told when it is made.

    Args:
      wanted: of which rows it is made; the others are in `everything` alone.
      as_kept: what of a row is needed.
      unique: no two rows may have one id.

    Raises:
      UserError: there is no such file, it holds no row, two have one id, or a line is malformed and `strict`.
    """

    def __init__(
        self,
        path: Path,
        row_type: type[Row],
        *,
        strict: bool = False,
        wrong: Callable[[Row], str | None] = lambda _: None,
        wanted: Callable[[Row], bool] = lambda _: True,
        as_kept: Callable[[Row], Row] = lambda row: row,
        unique: bool = False,
    ):
        sources.check(path)
        self._path, self._type, self._wrong, self._as_kept = path, row_type, wrong, as_kept
        self.wanted, self._version = wanted, sources.version(path)
        malformed, hashes = Malformed(strict), array.array("q")
        self._count, self.unwanted = 0, 0
        for row in read_rows(path, row_type, malformed, wrong):
            if isinstance(row, Dropped):
                continue
            self._count += wanted(row)
            self.unwanted += not wanted(row)
            if unique:
                hashes.append(hash(_id(row)))
        self.malformed = malformed.count
        if not self._count + self.unwanted:
            raise UserError(f"{sources.name(path)}: found no row that can be read, expected one a line")
        if mistakes := list(itertools.islice(self._repeated(hashes), _TOLD)):
            raise UserError(f"{sources.name(path)}: {'; '.join(mistakes)}; expected an id of its own a row")

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[Row]:
        return (self._as_kept(row) for row in self.everything() if not isinstance(row, Dropped) and self.wanted(row))

    def everything(self) -> Iterator[Row | Dropped]:
        """All rows, and the receipts of malformed lines, in their order.

        Raises:
          RunError: the file is another one now.
        """
        if self._version != sources.version(self._path):
            raise RunError(f"{sources.name(self._path)} changed while it was worked on; run the same command again")
        return read_rows(self._path, self._type, Malformed(told=0), self._wrong)

    def _repeated(self, hashes: "array.array[int]") -> Iterator[str]:
        """What is wrong with ids that come again."""
        again = repeated(hashes)
        places: dict[str, str] = {}
        for line in read_lines(self._path, Malformed(told=0)) if again else ():
            name = line.values.get("id") if isinstance(line, Line) else None
            if not isinstance(name, str) or hash(name) not in again:
                continue
            here = line.place.rpartition(":")[2]
            if (first := places.setdefault(name, here)) != here:
                yield f"line {here} repeats the id {name!r} of line {first}"


def repeated(hashes: "array.array[int]") -> set[int]:
    """Those numbers, of 64 bits each, that are there more than once."""
    ordered = np.sort(np.frombuffer(hashes, np.int64)) if hashes else np.zeros(0, np.int64)
    return set(ordered[1:][ordered[1:] == ordered[:-1]].tolist())


def _id(row: Any) -> str:
    return row.id
