"""Reads JSON Lines that others wrote: a broken line is reported and counted, and never stops the rest."""

import dataclasses
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NoReturn

from jaxdistill.errors import UserError


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
    if not path.is_file():
        found = "is a folder" if path.is_dir() else "no such file"
        raise UserError(f"{path}: {found}; expected a JSON Lines file")
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            place = f"{path}:{number}"
            try:
                values = json.loads(line, parse_constant=_refuse_constant)
                if not isinstance(values, dict):
                    raise ValueError(f"a JSON {type(values).__name__}, expected an object")
            except (ValueError, RecursionError) as error:
                if strict:
                    raise UserError(f"{place}: malformed: {error}; mend the line, or leave out --strict") from None
                yield Dropped(id=place, place=place, reason="malformed", detail=str(error)[:300])
                continue
            yield Line(place, values)


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")
