"""Rows as ArrayRecord, the format of grain: each record is a row as a line of JSON Lines has it."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jaxdistill.errors import UserError

SUFFIXES = (".array_record", ".arrayrecord")
_AT_ONCE = 1000  # records in memory


@contextlib.contextmanager
def _reader(path: Path) -> Iterator[Any]:
    try:
        from array_record.python.array_record_module import ArrayRecordReader
    except ImportError:
        raise UserError(f"{path} needs the package array-record, which is not installed; pip install it") from None
    reader = ArrayRecordReader(str(path))
    if not reader.ok():  # it raises nothing itself, and says that there are no records
        raise UserError(f"{path}: not an ArrayRecord file, or its index is damaged; write it anew")
    try:
        yield reader
    finally:
        reader.close()


def count(path: Path) -> int:
    """Records of a file on disk. Raises as `read`."""
    with _reader(path) as reader:
        return reader.num_records()


def read(path: Path, records: range | None = None) -> Iterator[tuple[int, bytes | str]]:
    """Yields the number from 1 and the content of each record of a file on disk, or what is wrong with it.

    Where the file is damaged every record of the group that holds the damage is lost, and each is named.

    Args:
      records: to read, counted from 0; all by default.

    Raises:
      UserError: array-record is not installed, or the file is no ArrayRecord.
    """
    with _reader(path) as reader:
        records = range(reader.num_records()) if records is None else records
        for start in range(records.start, records.stop, _AT_ONCE):
            stop = min(start + _AT_ONCE, records.stop)
            try:
                found = reader.read(start, stop)
            except RuntimeError:
                found = [_one(reader, i) for i in range(start, stop)]
            yield from enumerate(found, start=start + 1)


def _one(reader: Any, i: int) -> bytes | str:
    try:
        return reader.read([i])[0]
    except RuntimeError as error:
        return f"damaged record ({error})"
