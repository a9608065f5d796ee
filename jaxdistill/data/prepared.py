"""Examples tokenized once: parts on disk, which several processes write, a killed run goes on with and each start maps.

Tokenizing and packing depend on the file's content and on the tokenizer alone, so what is there for them is used again.
"""

import concurrent.futures
import contextlib
import dataclasses
import hashlib
import json
import multiprocessing
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, SupportsIndex

import numpy as np
from jaxtyping import Int, Int64
from rich.progress import track
from safetensors import safe_open
from safetensors.numpy import save_file

from jaxdistill import array_records, manifest, parquet, records, sources
from jaxdistill.data import chat
from jaxdistill.data.chat import Document
from jaxdistill.errors import UserError

_FORMAT = 2  # of the parts, and of how examples become tokens: another one is prepared anew
PART_BYTES = 2**25  # of an examples file: what one process tokenizes at a time, and what a kill may lose
_SHOWN = 10  # of the rows that are wrong

BadRows = Literal["stop", "skip"]  # what rows that cannot be used do: end the run, or are left out and named


class Documents(Sequence[Document]):
    """Tokenized examples on disk. Of each a few numbers are in memory; its tokens are read when they are asked for.

    Attributes:
      lengths: positions that each takes in a row.
      trained_tokens: tokens with loss of each.
      digest: SHA-256 of all that is in them.
      largest: the largest token, and the id of an example that holds it.
      wrong: number in the file, and reason, of each row that is no example or cannot be tokenized.
    """

    def __init__(self, parts: Sequence[Path]):
        self._parts = [safe_open(path, "numpy") for path in parts]
        facts = [part.metadata() for part in self._parts]
        self._token_stops = [part.get_tensor("token_stops") for part in self._parts]  # within their part
        self._id_stops = [part.get_tensor("id_stops") for part in self._parts]
        self._firsts = np.cumsum([0, *map(len, self._token_stops)])  # document that each part starts with, and the end
        self.lengths: Int64[np.ndarray, " documents"] = np.concatenate(
            [np.diff(stops, prepend=0) - 1 for stops in self._token_stops]
        )
        self.trained_tokens: Int[np.ndarray, " documents"] = np.concatenate(
            [part.get_tensor("trained_tokens") for part in self._parts]
        )
        self.digest = hashlib.sha256("".join(fact["digest"] for fact in facts).encode()).hexdigest()
        self.largest = max((int(fact["largest"]), fact["largest_id"]) for fact in facts)
        self.wrong = [
            (number, reason)
            for part in self._parts
            for number, reason in json.loads(part.get_tensor("wrong").tobytes())
        ]

    def __len__(self) -> int:
        return int(self._firsts[-1])

    def __getitem__(self, index: SupportsIndex) -> Document:  # type: ignore[override]
        number, i = self._place(index)
        part, here = self._parts[number], _span(self._token_stops[number], i)
        tokens, trained = part.get_slice("tokens")[here], part.get_slice("trained")[here]
        return Document(self.id_of(index), tokens, trained, float(part.get_slice("weights")[i : i + 1][0]))

    def id_of(self, index: SupportsIndex) -> str:
        """The id of an example, without its tokens."""
        number, i = self._place(index)
        return self._parts[number].get_slice("ids")[_span(self._id_stops[number], i)].tobytes().decode()

    def _place(self, index: SupportsIndex) -> tuple[int, int]:
        """Part, and place within it."""
        index = range(len(self))[int(index)]
        number = int(np.searchsorted(self._firsts, index, side="right")) - 1
        return number, index - int(self._firsts[number])


def _span(stops: np.ndarray, i: int) -> slice:
    return slice(int(stops[i - 1]) if i else 0, int(stops[i]))


def write_part(path: Path, documents: Sequence[Document], wrong: Sequence[tuple[int, str]] = ()) -> None:
    """Writes documents, and which rows are none, as a part that `Documents` reads; it appears whole or not at all."""
    ids = [document.id.encode() for document in documents]
    arrays = {
        "tokens": _joined([d.tokens for d in documents], np.int32),
        "trained": _joined([d.trained for d in documents], bool),
        "ids": np.frombuffer(b"".join(ids), np.uint8),
        "token_stops": np.cumsum([len(d.tokens) for d in documents], dtype=np.int64),
        "id_stops": np.cumsum([len(id_) for id_ in ids], dtype=np.int64),
        "weights": np.array([d.weight for d in documents], np.float64),
        "trained_tokens": np.array([np.count_nonzero(d.trained[1:]) for d in documents], np.int32),
    }
    digest = hashlib.sha256()
    for name, array in arrays.items():
        digest.update(f"{name} {len(array)} ".encode() + array.tobytes())
    largest = max(((int(d.tokens.max()), d.id) for d in documents), default=(-1, ""))
    facts = {"digest": digest.hexdigest(), "largest": str(largest[0]), "largest_id": largest[1]}
    arrays["wrong"] = np.frombuffer(json.dumps(wrong).encode(), np.uint8)  # not in the digest: no batch depends on it
    save(path, arrays, facts)


def save(path: Path, arrays: dict[str, np.ndarray], facts: dict[str, str] | None = None) -> None:
    """Writes arrays as a file that appears whole or not at all, also where another run writes the same."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(f".{os.getpid()}.partial")
    save_file(arrays, partial, facts)
    partial.replace(path)


def _joined(arrays: Sequence[np.ndarray], dtype: Any) -> np.ndarray:
    return np.concatenate([np.zeros(0, dtype), *arrays]).astype(dtype, copy=False)


@dataclasses.dataclass(frozen=True)
class Stretch:
    """Whole lines, row groups of a Parquet file or records of an ArrayRecord file, as many as a part is made of."""

    start: int  # bytes, row groups or records
    stop: int
    line: int  # number of the first, or of the first row, from 1


class Prepared(NamedTuple):
    """A file of examples as tokens."""

    documents: Documents
    folder: Path  # that they are kept in
    sha256: str  # of the file


def prepare(
    path: Path, tokenizer: Any, cache: Path, show_progress: bool = True, bad_rows: BadRows = "stop"
) -> Prepared:
    """The examples of a file or URL as tokens: JSON Lines, or Parquet or ArrayRecord by its name.

    A long file is worked on by several processes, each of which reads its stretches of it.

    Args:
      cache: folder that holds what was prepared before; a stretch of the file that is there is not done again.

    Raises:
      UserError: the file is missing or empty, none of its rows can be used, or some cannot and they are to `stop` the
        run; names them.
    """
    parts, folder, hash_ = plan(path, tokenizer, cache)
    wanted = [(stretch, part) for stretch, part in parts if not part.is_file()]
    with _readable(path) if wanted else contextlib.nullcontext(path) as here:
        done = _tokenized(here, wanted, tokenizer)
        shown = show_progress and bool(wanted)
        for _ in track(done, f"tokenize {path.name}", total=len(wanted), transient=True, disable=not shown):
            pass
    documents = Documents([part for _, part in parts])
    if documents.wrong and (bad_rows == "stop" or not len(documents)):
        way = "mend or remove them, or leave them out (train: --bad-rows skip)" if len(documents) else "mend them"
        raise UserError(f"{in_words(path, documents.wrong)}\n{way}")
    return Prepared(documents, folder, hash_)


def in_words(path: Path, wrong: Sequence[tuple[int, str]]) -> str:
    """The first of the rows of a file that are wrong, a line each, and how many there are."""
    shown = [f"{sources.name(path)}:{number}: {reason}" for number, reason in wrong[:_SHOWN]]
    more = [f"... and {len(wrong) - _SHOWN} more"] if len(wrong) > _SHOWN else []
    many = f"{len(wrong)} examples" if len(wrong) > 1 else "an example"
    return "\n".join([f"{sources.name(path)}: {many} cannot be used:", *shown, *more])


def _readable(path: Path) -> contextlib.AbstractContextManager[Path]:
    """The file as its readers take it: that of ArrayRecord reads from disks alone."""
    return sources.on_disk(path) if sources.suffix(path) in array_records.SUFFIXES else contextlib.nullcontext(path)


def plan(path: Path, tokenizer: Any, cache: Path) -> tuple[list[tuple[Stretch, Path]], Path, str]:
    """Which stretch of a file is tokenized into which part, the folder of them all, and the SHA-256 of the file.

    Arguments as of `prepare`.
    """
    hash_, stretches = _scan(path, cache)
    if not stretches:
        raise UserError(f"{sources.name(path)} is empty; expected an example on each line")
    key = hashlib.sha256(json.dumps([_FORMAT, hash_, _fingerprint(tokenizer)]).encode()).hexdigest()[:16]
    folder = cache / f"{sources.unsigned(path).stem}-{key}"
    return [(stretch, folder / f"{number:06}.safetensors") for number, stretch in enumerate(stretches)], folder, hash_


def _scan(path: Path, cache: Path) -> tuple[str, list[Stretch]]:
    """SHA-256 of a file, and its stretches.

    Each file is read once for that. What was found counts while what its file system says of it is the same, which for
    a remote file spares the transfer; the parts themselves go by the content alone.
    """
    sources.check(path)
    version = sources.version(path)
    kept = cache / "files" / f"{hashlib.sha256(sources.absolute(path).encode()).hexdigest()[:16]}.json"
    if version is not None and kept.is_file():
        known = json.loads(kept.read_bytes())
        if known.get("version") == version:
            return known["sha256"], [Stretch(*numbers) for numbers in known["stretches"]]
    hash_, stretches = _look(path)
    facts = {"version": version, "sha256": hash_, "stretches": [dataclasses.astuple(s) for s in stretches]}
    manifest.write_json(kept, facts)
    return hash_, stretches


def _look(path: Path) -> tuple[str, list[Stretch]]:
    """SHA-256 of a file, and its stretches, from its bytes."""
    if sources.suffix(path) == parquet.SUFFIX:
        return manifest.file_hash(path), _cut(parquet.groups(path))
    if sources.suffix(path) not in array_records.SUFFIXES:
        return _scan_lines(path)
    with _readable(path) as here:
        count = array_records.count(here)
        at_once = max(1, PART_BYTES * count // max(here.stat().st_size, 1))
        starts = range(0, count, at_once)
        return manifest.file_hash(here), [Stretch(start, min(start + at_once, count), start + 1) for start in starts]


def _scan_lines(path: Path) -> tuple[str, list[Stretch]]:
    digest, stretches, start, line = hashlib.sha256(), [], 0, 1
    with sources.open_file(path) as file:
        while lines := file.readlines(PART_BYTES):
            content = b"".join(lines)
            digest.update(content)
            stretches.append(Stretch(start, start + len(content), line))
            start, line = start + len(content), line + len(lines)
    return digest.hexdigest(), stretches


def _cut(groups: Sequence[tuple[int, int]]) -> list[Stretch]:
    """Stretches of row groups, of which there are rows and bytes."""
    stretches: list[Stretch] = []
    start, line, rows, size = 0, 1, 0, 0
    for stop, (count, bytes_) in enumerate(groups, start=1):
        rows, size = rows + count, size + bytes_
        if size >= PART_BYTES or stop == len(groups):
            stretches.append(Stretch(start, stop, line))
            start, line, rows, size = stop, line + rows, 0, 0
    return stretches


def _rows(path: Path, stretch: Stretch) -> Iterator[tuple[int, dict[str, Any] | str]]:
    """Number and content of each row of a stretch, or what is wrong with it."""
    if sources.suffix(path) == parquet.SUFFIX:
        yield from parquet.read(path, range(stretch.start, stretch.stop), stretch.line)
    elif sources.suffix(path) in array_records.SUFFIXES:
        yield from records.read_array_records(path, range(stretch.start, stretch.stop))
    else:
        with sources.open_file(path) as file:
            file.seek(stretch.start)
            lines = file.read(stretch.stop - stretch.start).split(b"\n")
        for number, line in enumerate(lines, start=stretch.line):
            if line.strip():
                yield number, records.parse(line)


def _fingerprint(tokenizer: Any) -> str:
    """SHA-256 of what a tokenizer does."""
    rules = tokenizer.backend_tokenizer.to_str() + tokenizer.chat_template + json.dumps(tokenizer.special_tokens_map)
    return hashlib.sha256(rules.encode()).hexdigest()


def _tokenized(path: Path, wanted: Sequence[tuple[Stretch, Path]], tokenizer: Any) -> Iterator[None]:
    """Writes the parts; yields after each."""
    if len(wanted) < 2:
        yield from (tokenize(path, tokenizer, *one) for one in wanted)
        return
    with concurrent.futures.ProcessPoolExecutor(
        min(len(wanted), os.cpu_count() or 1), multiprocessing.get_context("spawn"), _begin, (path, tokenizer)
    ) as pool:
        yield from pool.map(_tokenize_here, *zip(*wanted, strict=True))


_work: list[Any] = []  # of a process of the pool: the file and the tokenizer


def _begin(path: Path, tokenizer: Any) -> None:
    _work[:] = [path, tokenizer]


def _tokenize_here(stretch: Stretch, target: Path) -> None:
    path, tokenizer = _work
    tokenize(path, tokenizer, stretch, target)


def tokenize(path: Path, tokenizer: Any, stretch: Stretch, target: Path) -> None:
    """Writes the part of a stretch: its examples, and what is wrong with its other rows.

    Nothing in a part names the file: another one with the same content has the same parts.
    """
    documents, wrong = [], []
    for number, values in _rows(path, stretch):
        if isinstance(values, str):
            wrong.append((number, values))
            continue
        try:
            example = records.from_dict(values, records.Example, f"{number}")
            documents.append(chat.tokenize(tokenizer, example))
        except UserError as error:
            wrong.append((number, f"{error}".removeprefix(f"{number}: ")))
    write_part(target, documents, wrong)
