"""Examples tokenized once: parts on disk, which several processes write, a killed run goes on with and each start maps.

Tokenizing and packing depend on the file's content and on the tokenizer alone, so what is there for them is used again.
"""

import concurrent.futures
import dataclasses
import hashlib
import json
import multiprocessing
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, SupportsIndex

import numpy as np
from jaxtyping import Int, Int64
from rich.progress import track
from safetensors import safe_open
from safetensors.numpy import save_file

from jaxdistill import manifest, parquet, records
from jaxdistill.data import chat
from jaxdistill.data.chat import Document
from jaxdistill.errors import UserError

_FORMAT = 1  # of the parts, and of how examples become tokens: another one is prepared anew
PART_BYTES = 2**25  # of an examples file: what one process tokenizes at a time, and what a kill may lose
_SHOWN = 10  # of the lines that are wrong


class Documents(Sequence[Document]):
    """Tokenized examples on disk. Of each a few numbers are in memory; its tokens are read when they are asked for.

    Attributes:
      lengths: positions that each takes in a row.
      trained_tokens: tokens with loss of each.
      digest: SHA-256 of all that is in them.
      largest: the largest token, and the id of an example that holds it.
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


def write_part(path: Path, documents: Sequence[Document]) -> None:
    """Writes documents as a part that `Documents` reads; the file appears whole or not at all."""
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
    """Whole lines of a JSON Lines file or row groups of a Parquet file, as many as a part is made of."""

    start: int  # bytes, or row groups
    stop: int
    line: int  # number of the first, or of the first row, from 1


def prepare(path: Path, tokenizer: Any, cache: Path, show_progress: bool = True) -> tuple[Documents, Path]:
    """The examples of a file (JSON Lines, or Parquet by its name) as tokens, and the folder that they are kept in.

    A long file is worked on by several processes.

    Args:
      cache: folder that holds what was prepared before; a stretch of the file that is there is not done again.

    Raises:
      UserError: the file is missing or empty, or some of its lines are malformed or cannot be tokenized; names them.
    """
    parts, folder = plan(path, tokenizer, cache)
    wanted = [(stretch, part) for stretch, part in parts if not part.is_file()]
    wrong = []
    steps = track(
        _tokenized(path, wanted, tokenizer),
        f"tokenize {path.name}",
        total=len(wanted),
        transient=True,
        disable=not (show_progress and wanted),
    )
    for found in steps:
        wrong += found
    if wrong:
        more = f"\n... and {len(wrong) - _SHOWN} more" if len(wrong) > _SHOWN else ""
        many = f"{path}: {len(wrong)} examples cannot be used:\n" if len(wrong) > 1 else ""
        raise UserError(many + "\n".join(wrong[:_SHOWN]) + more)
    return Documents([part for _, part in parts]), folder


def plan(path: Path, tokenizer: Any, cache: Path) -> tuple[list[tuple[Stretch, Path]], Path]:
    """Which stretch of a file is tokenized into which part, and the folder of them all; arguments as of `prepare`."""
    hash_, stretches = _scan(path, cache)
    if not stretches:
        raise UserError(f"{path} is empty; expected an example on each line")
    key = hashlib.sha256(json.dumps([_FORMAT, hash_, _fingerprint(tokenizer)]).encode()).hexdigest()[:16]
    folder = cache / f"{path.stem}-{key}"
    return [(stretch, folder / f"{number:06}.safetensors") for number, stretch in enumerate(stretches)], folder


def _scan(path: Path, cache: Path) -> tuple[str, list[Stretch]]:
    """SHA-256 of a file, and its stretches; what is kept of an earlier look counts while size and time are the same."""
    if not path.is_file():
        raise UserError(f"{path}: {'is a folder' if path.is_dir() else 'no such file'}; expected a JSON Lines file")
    name = hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:16]
    kept, seen = cache / "files" / f"{name}.json", path.stat()
    identity = {"path": str(path.resolve()), "bytes": seen.st_size, "modified_ns": seen.st_mtime_ns}
    if kept.is_file():
        known = json.loads(kept.read_bytes())
        if {name: known[name] for name in identity} == identity:
            return known["sha256"], [Stretch(*numbers) for numbers in known["stretches"]]
    found = _scan_row_groups(path) if path.suffix == parquet.SUFFIX else _scan_lines(path)
    manifest.write_json(kept, {**identity, "sha256": found[0], "stretches": [dataclasses.astuple(s) for s in found[1]]})
    return found


def _scan_lines(path: Path) -> tuple[str, list[Stretch]]:
    digest, stretches, start, line = hashlib.sha256(), [], 0, 1
    with path.open("rb") as file:
        while lines := file.readlines(PART_BYTES):
            content = b"".join(lines)
            digest.update(content)
            stretches.append(Stretch(start, start + len(content), line))
            start, line = start + len(content), line + len(lines)
    return digest.hexdigest(), stretches


def _scan_row_groups(path: Path) -> tuple[str, list[Stretch]]:
    stretches: list[Stretch] = []
    start, line, rows, size = 0, 1, 0, 0
    groups = parquet.groups(path)
    for stop, (count, bytes_) in enumerate(groups, start=1):
        rows, size = rows + count, size + bytes_
        if size >= PART_BYTES or stop == len(groups):
            stretches.append(Stretch(start, stop, line))
            start, line, rows, size = stop, line + rows, 0, 0
    return manifest.file_hash(path), stretches


def _rows(path: Path, stretch: Stretch) -> Iterator[tuple[int, dict[str, Any] | str]]:
    """Number and content of each row of a stretch, or what is wrong with it."""
    if path.suffix == parquet.SUFFIX:
        yield from parquet.read(path, range(stretch.start, stretch.stop), stretch.line)
        return
    with path.open("rb") as file:
        file.seek(stretch.start)
        lines = file.read(stretch.stop - stretch.start).split(b"\n")
    for number, line in enumerate(lines, start=stretch.line):
        if line.strip():
            yield number, records.parse(line)


def _fingerprint(tokenizer: Any) -> str:
    """SHA-256 of what a tokenizer does."""
    rules = tokenizer.backend_tokenizer.to_str() + tokenizer.chat_template + json.dumps(tokenizer.special_tokens_map)
    return hashlib.sha256(rules.encode()).hexdigest()


def _tokenized(path: Path, wanted: Sequence[tuple[Stretch, Path]], tokenizer: Any) -> Iterator[list[str]]:
    """Writes the parts; yields of each the lines that are wrong, and one with such lines is not written."""
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


def _tokenize_here(stretch: Stretch, target: Path) -> list[str]:
    path, tokenizer = _work
    return tokenize(path, tokenizer, stretch, target)


def tokenize(path: Path, tokenizer: Any, stretch: Stretch, target: Path) -> list[str]:
    """Writes the part of a stretch, unless lines of it are wrong: says what is."""
    documents, wrong = [], []
    for number, values in _rows(path, stretch):
        where = f"{path}:{number}"
        try:
            if isinstance(values, str):
                raise UserError(f"{where}: {values}; mend or remove the line")
            documents.append(chat.tokenize(tokenizer, records.from_dict(values, records.Example, where)))
        except UserError as error:
            wrong.append(f"{error}")
    if not wrong:
        write_part(target, documents)
    return wrong
