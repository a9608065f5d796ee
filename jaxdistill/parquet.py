"""Rows as Parquet: the same as in JSON Lines, through pyarrow where it is installed."""

import contextlib
import dataclasses
import itertools
import types
import typing
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

from jaxdistill import sources
from jaxdistill.errors import UserError

SUFFIX = ".parquet"
_GROUP = 1000  # rows in memory at a time
_MESSAGE = ("role", "content", "reasoning_content")  # a chat message's fields, where a row has Mapping[str, str]


def check_installed(wanted: str) -> Any:
    """pyarrow.

    Raises:
      UserError: it is not installed; `wanted` says what for.
    """
    try:
        import pyarrow.parquet
    except ImportError:
        raise UserError(
            f"{wanted} needs the package pyarrow, which is not installed; pip install 'jaxdistill[parquet]'"
        ) from None
    return pyarrow


def write(path: Path, rows: Iterable[Any], row_type: type) -> int:
    """Writes rows of a dataclass and returns their number; the file appears whole or not at all.

    What JSON leaves out is null here. Half an emoji, which UTF-8 cannot hold, becomes U+FFFD.
    """
    pyarrow = check_installed(str(path))
    schema = _type(pyarrow, row_type)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    count, rows = 0, iter(rows)
    with pyarrow.parquet.ParquetWriter(partial, pyarrow.schema(schema.fields)) as writer:
        while group := list(itertools.islice(rows, _GROUP)):
            values = [_whole(dataclasses.asdict(row)) for row in group]
            writer.write_table(pyarrow.Table.from_pylist(values, schema=writer.schema))
            count += len(group)
    partial.replace(path)
    return count


def groups(path: Path) -> list[tuple[int, int]]:
    """Rows and uncompressed bytes of each row group of a file. Raises as `read`."""
    with _opened(path) as (_, file):
        found = [file.metadata.row_group(i) for i in range(file.metadata.num_row_groups)]
        return [(group.num_rows, group.total_byte_size) for group in found]


def read(path: Path, groups: range | None = None, first: int = 1) -> Iterator[tuple[int, dict[str, Any] | str]]:
    """Yields (row number, row) as JSON Lines would have it: what is null is left out.

    Where the file is damaged the rest of that row group is lost; of each of its rows there is what is wrong instead.

    Args:
      groups: row groups to read; all by default.
      first: the number of the first row that is read.

    Raises:
      UserError: pyarrow is not installed, or the file is no Parquet.
    """
    with _opened(path) as (pyarrow, file):
        for group in range(file.metadata.num_row_groups) if groups is None else groups:
            stop = first + file.metadata.row_group(group).num_rows
            try:
                for batch in file.iter_batches(batch_size=_GROUP, row_groups=[group]):
                    yield from enumerate(map(_without_nulls, batch.to_pylist()), start=first)
                    first += len(batch)
            except (pyarrow.ArrowInvalid, OSError) as error:
                # What a network does is no damage; Arrow's own words of a bad page are an OSError without a number
                if isinstance(error, OSError) and (sources.is_remote(path) or error.errno is not None):
                    raise
                yield from ((number, f"damaged row group ({error})") for number in range(first, stop))
            first = stop


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[tuple[Any, Any]]:
    """pyarrow, and the file as it reads it."""
    pyarrow = check_installed(sources.name(path))
    with sources.open_file(path) if sources.is_remote(path) else contextlib.nullcontext(path) as source:
        try:
            file = pyarrow.parquet.ParquetFile(source)
        except pyarrow.ArrowInvalid as error:
            raise UserError(
                f"{sources.name(path)}: not a Parquet file ({error}); expected one, or a name that does not end so"
            ) from None
        with file:
            yield pyarrow, file


def _type(pyarrow: Any, hint: Any) -> Any:
    """Parquet's type of a field by its annotation."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        return _type(pyarrow, next(a for a in arguments if a is not type(None)))
    if dataclasses.is_dataclass(hint):
        hints = typing.get_type_hints(hint)
        return pyarrow.struct([(field.name, _type(pyarrow, hints[field.name])) for field in dataclasses.fields(hint)])
    if origin is tuple:
        return pyarrow.list_(_type(pyarrow, arguments[0]))
    if origin is Mapping:
        return pyarrow.struct([(name, pyarrow.string()) for name in _MESSAGE])
    if origin is Literal:
        return pyarrow.string()
    return {str: pyarrow.string(), int: pyarrow.int64(), float: pyarrow.float64(), bool: pyarrow.bool_()}[hint]


def _whole(value: Any) -> Any:
    if isinstance(value, str):
        return value if value.isascii() else value.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    if isinstance(value, dict):
        return {name: _whole(one) for name, one in value.items()}
    return [_whole(one) for one in value] if isinstance(value, list | tuple) else value


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _without_nulls(one) for name, one in value.items() if one is not None}
    return [_without_nulls(one) for one in value] if isinstance(value, list) else value
