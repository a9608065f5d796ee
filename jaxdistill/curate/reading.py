"""Reads rows that others wrote: a broken line is reported and counted, and never stops the rest."""

import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from jaxdistill.errors import UserError
from jaxdistill.records import read_json_lines


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


def read_lines(path: Path, strict: bool) -> Iterator[Line | Dropped]:
    """Yields each line's object, or the receipt of a line that holds none; one line is in memory at a time.

    Raises:
      UserError: there is no such file, or a line is malformed and `strict`.
    """
    for number, values in read_json_lines(path):
        place = f"{path}:{number}"
        if not isinstance(values, str):
            yield Line(place, values)
        elif strict:
            raise UserError(f"{place}: malformed: {values}; mend the line, or leave out --strict")
        else:
            yield Dropped(id=place, place=place, reason="malformed", detail=values[:300])
