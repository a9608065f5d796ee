"""The rows that stages exchange: JSON Lines, Parquet or ArrayRecord. Bump SCHEMA when a field changes its meaning."""

import contextlib
import dataclasses
import json
import os
import types
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any, Literal, TypeVar

from jaxdistill import array_records, parquet, sources
from jaxdistill.errors import UserError

SCHEMA = 1

Message = Mapping[str, str]  # {"role": "system" | "user" | "assistant", "content": text, "reasoning_content"?: text}
FinishReason = Literal["stop", "length", "content_filter"]
Label = Literal["correct", "wrong", "unverifiable", "rated"]  # rated: by points alone


@dataclasses.dataclass(frozen=True, kw_only=True)
class Problem:
    """One question, with a gold answer where there is one."""

    id: str
    problem: str
    answer: str | None = None
    solution: str | None = None  # worked solution of the source, if any
    source: str = ""
    licence: str = ""
    language: str = "en"
    meta: Mapping[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Usage:
    """Token counts as the API reported them; output includes reasoning."""

    prompt_tokens: int = 0
    output_tokens: int = 0
    reasoning_tokens: int = 0
    cached_tokens: int = 0  # prompt tokens that the provider had in its cache, often cheaper


@dataclasses.dataclass(frozen=True, kw_only=True)
class Verdict:
    """Whether an answer equals the gold one, and the rule that decided."""

    label: Label
    rule: str
    extracted: str | None = None  # the answer that was compared


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chain:
    """One teacher answer to one problem."""

    id: str
    problem_id: str
    messages: tuple[Message, ...]  # prompt and answer; the answer's reasoning under "reasoning_content"
    reasoning_kind: Literal["full", "summary", "answer_only", "synthesized"]
    teacher: str  # model name as the server gave it
    prompt_hash: str  # sha256 of model, messages and parameters
    request_id: str
    sample_index: int
    finish_reason: FinishReason
    usage: Usage
    cost_usd: float
    verdict: Verdict
    created: float  # seconds since the epoch
    prompt: str = ""  # name of the prompt file and SHA-256 of its text, as name@hash; empty without one
    latency_s: float = 0.0  # from sending the request to the whole answer
    flags: tuple[str, ...] = ()  # what a reader should know: two_answers


@dataclasses.dataclass(frozen=True, kw_only=True)
class Example:
    """One conversation to train on: loss falls on the assistant's messages."""

    id: str
    messages: tuple[Message, ...]
    weight: float = 1.0
    provenance: tuple[str, ...] = ()  # ids of the chains or problems it came from


@dataclasses.dataclass(frozen=True, kw_only=True)
class Completion:
    """One sampled answer of a model under evaluation."""

    id: str  # task/item_id/sample_index
    task: str
    item_id: str
    sample_index: int
    seed: int
    settings: Mapping[str, Any]  # temperature, top_p, ... as sampled
    text: str
    thinking_tokens: int
    answer_tokens: int
    finish_reason: Literal["stop", "length"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Score:
    """The grade of one completion."""

    completion_id: str
    verdict: Verdict
    grader: str
    points: float | None = None  # 0 to 1, of a judge; None: 1 if correct, else 0
    judge: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # model, prompt, request and words of a judge


Row = TypeVar("Row")


def read_jsonl(path: str | os.PathLike[str], row_type: type[Row]) -> Iterator[Row]:
    """Yields the rows of a file or URL: JSON Lines, or Parquet or ArrayRecord if its name ends so.

    Unknown keys are an error: a typing mistake in an optional key would be lost without a word.

    Raises:
      UserError: the file is missing, or a line is not a JSON object with the fields of `row_type`; names the line.
    """
    for number, values in read_json_objects(path):
        yield from_dict(values, row_type, where=f"{sources.name(Path(path))}:{number}")


Convert = Callable[[int, dict[str, Any]], dict[str, Any]]  # line number and upstream row -> fields of a Problem


def read_problems(
    path: Path,
    *,
    licence: str = "",
    extra: Iterable[str] = (),
    convert: Convert | None = None,
    answers: bool = True,
) -> list[Problem]:
    """Reads Problem rows that all have an answer and an id of their own; keys in `extra` move to `meta`.

    Args:
      convert: for files in the benchmark's own shape.
      answers: whether each row needs an answer.

    Raises:
      UserError: the file is missing, empty or malformed, or rows lack an answer or share an id; names the lines.
    """
    problems: list[Problem] = []
    lines: dict[str, int] = {}
    mistakes: list[str] = []
    for number, values in read_json_objects(path):
        values = convert(number, values) if convert else values
        moved = {key: values.pop(key) for key in extra if key in values}
        problem = from_dict({"licence": licence, **values}, Problem, where=f"{sources.name(path)}:{number}")
        problem = dataclasses.replace(problem, meta={**problem.meta, **moved})
        if answers and not (problem.answer or "").strip():
            mistakes.append(f"line {number} ({problem.id}) has no answer")
        if problem.id in lines:
            mistakes.append(f"line {number} repeats the id {problem.id!r} of line {lines[problem.id]}")
        lines.setdefault(problem.id, number)
        problems.append(problem)
    if mistakes:
        more = f" and {len(mistakes) - 10} more" if len(mistakes) > 10 else ""
        raise UserError(
            f"{path}: {'; '.join(mistakes[:10])}{more}; expected {'an answer and ' * answers}an id of its own a row"
        )
    if not problems:
        raise UserError(f"{path}: found no rows, expected one problem a line")
    return problems


def read_json_objects(path: str | os.PathLike[str]) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yields (line number from 1, object) for each non-empty line of a JSON Lines file of any shape.

    Raises:
      UserError: the file is missing, or a line holds no object.
    """
    for number, values in read_json_lines(path):
        if isinstance(values, str):
            raise UserError(f"{sources.name(Path(path))}:{number}: {values}; mend or remove the line")
        yield number, values


def read_json_lines(path: str | os.PathLike[str]) -> Iterator[tuple[int, dict[str, Any] | str]]:
    """Yields (line number from 1, object, or what is wrong with it) for each non-empty line of a file or URL.

    Of a file whose name ends as Parquet's or ArrayRecord's: the number of each row from 1, and the row.

    Raises:
      UserError: the file is missing.
    """
    path = Path(path)
    sources.check(path)
    suffix = sources.suffix(path)
    if suffix == parquet.SUFFIX:
        yield from parquet.read(path)
    elif suffix in array_records.SUFFIXES:
        with sources.on_disk(path) as here:
            yield from read_array_records(here)
    else:
        with sources.open_file(path) as lines:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    yield number, parse(line)


def read_array_records(path: Path, records: range | None = None) -> Iterator[tuple[int, dict[str, Any] | str]]:
    """Yields (record number from 1, object, or what is wrong with it); arguments as of `array_records.read`."""
    for number, record in array_records.read(path, records):
        yield number, record if isinstance(record, str) else parse(record)


def parse(line: bytes) -> dict[str, Any] | str:
    """The object that a line holds, or what is wrong with it."""
    try:
        values = json.loads(line, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        return f"not valid JSON ({error}), expected one object a line"
    return values if isinstance(values, dict) else f"found a JSON {type(values).__name__}, expected an object"


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def from_dict(values: Mapping[str, Any], row_type: type[Row], where: str) -> Row:
    """Builds a row from parsed JSON, nested rows included; `where` starts the error message."""
    fields = {field.name: field for field in dataclasses.fields(row_type)}  # type: ignore[arg-type]
    required = {n for n, f in fields.items() if f.default is f.default_factory is dataclasses.MISSING}
    missing, unknown = sorted(required - values.keys()), sorted(values.keys() - fields.keys())
    if missing or unknown:
        raise UserError(
            f"{where}: not a {row_type.__name__}: missing fields {missing}, unknown fields {unknown}; "
            f"expected {sorted(required)} and optionally {sorted(fields.keys() - required)}"
        )
    hints = typing.get_type_hints(row_type)
    return row_type(**{name: _value(value, hints[name], f"{where}: {name}") for name, value in values.items()})


def _value(value: Any, hint: Any, where: str) -> Any:
    """Checks one JSON value against its annotation; lists become tuples and objects nested rows."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return value
    if origin in (types.UnionType, typing.Union):
        if value is None and type(None) in arguments:
            return None
        return _value(value, next(a for a in arguments if a is not type(None)), where)
    if dataclasses.is_dataclass(hint) and isinstance(value, dict):
        return from_dict(value, hint, where)  # type: ignore[arg-type]
    if origin is tuple and isinstance(value, list):
        return tuple(_value(v, arguments[0], f"{where}[{i}]") for i, v in enumerate(value))
    if origin is Literal and value in arguments:
        return value
    if origin is Mapping and isinstance(value, dict):
        return {key: _value(v, arguments[1], f"{where}.{key}") for key, v in value.items()}
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if isinstance(hint, type) and isinstance(value, hint) and not (hint is int and isinstance(value, bool)):
        return value
    expected = f"one of {list(arguments)}" if origin is Literal else getattr(hint, "__name__", str(hint))
    raise UserError(f"{where}: found {value!r:.80}, expected {expected}")


def to_json(row: Any) -> str:
    """One row as one line of JSON, without the newline; ASCII, so that half an emoji that an API sent is kept."""
    return json.dumps(row if isinstance(row, dict) else dataclasses.asdict(row), allow_nan=False)


def write_jsonl(path: str | os.PathLike[str], rows: Iterable[Any]) -> int:
    """Writes rows and returns their number; the file appears whole or not at all."""
    path = Path(path)
    count = 0
    with whole_file(path) as lines:
        for row in rows:
            lines.write(to_json(row) + "\n")
            count += 1
    return count


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[IO[str]]:
    """A text file to write that appears whole, or not at all where the block raises."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    with partial.open("w", encoding="utf-8") as text:
        yield text
    partial.replace(path)
