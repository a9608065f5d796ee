"""Example files to batches: drop what does not fit with a receipt, pack, deal in an order that resumes."""

import dataclasses
import functools
import hashlib
import itertools
import json
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any, NamedTuple, SupportsIndex

import grain
import jax
import numpy as np
from jaxtyping import Int32, Int64
from safetensors.numpy import load_file

from jaxdistill import sources
from jaxdistill.data import packing, prepared
from jaxdistill.data.dealing import Deal
from jaxdistill.data.packing import Batch
from jaxdistill.data.prepared import BadRows, Documents
from jaxdistill.errors import UserError


@dataclasses.dataclass(frozen=True)
class PackedSet:
    """A data set packed into rows. What it holds of a document in memory are a few numbers."""

    documents: Documents
    items: Int32[np.ndarray, " kept"]  # documents, row after row
    stops: Int64[np.ndarray, " rows"]  # where each row ends among them
    row_tokens: int
    dropped: list[dict[str, Any]]  # a receipt for each document that is longer than a row
    wrong: list[dict[str, Any]]  # a receipt for each row of the file that is no example
    sha256: str  # of the file

    def __len__(self) -> int:
        return len(self.stops)

    def _documents(self, index: SupportsIndex) -> np.ndarray:
        return self.items[int(self._starts[int(index)]) : int(self.stops[int(index)])]

    def arrays(self, index: SupportsIndex) -> Batch:
        """The arrays [T] of a row."""
        return packing.make_row([self.documents[i] for i in self._documents(index)], self.row_tokens)

    def ids(self, index: SupportsIndex) -> list[str]:
        """The ids of a row's documents."""
        return [self.documents.id_of(i) for i in self._documents(index)]

    def tokens(self, index: SupportsIndex) -> int:
        """Positions that a row's documents take."""
        return int(self.documents.lengths[self._documents(index)].sum())

    @functools.cached_property
    def _starts(self) -> np.ndarray:
        return np.concatenate([[0], self.stops[:-1]])

    def fingerprint(self) -> str:
        """SHA-256 of all that a batch can hold: tokens, what is trained, weights, and how rows are packed."""
        digest = hashlib.sha256(f"{self.documents.digest} {self.row_tokens}".encode())
        digest.update(self.items.tobytes() + self.stops.tobytes())
        return digest.hexdigest()

    @property
    def documents_of_fullest_row(self) -> int:
        """The most documents that a row holds."""
        return int((self.stops - self._starts).max())

    @property
    def trained_tokens(self) -> int:
        """Tokens with loss in one epoch."""
        return int(self.documents.trained_tokens[self.items].sum())

    @property
    def lengths(self) -> np.ndarray:
        """Positions of each document, row after row, float64."""
        return self.documents.lengths[self.items].astype(np.float64)

    @property
    def attended_tokens(self) -> float:
        """Document length averaged over the tokens of the rows: the `attended` of Config.flops_per_token."""
        return float(self.squares.sum() / max(self.lengths.sum(), 1))

    @property
    def squares(self) -> np.ndarray:
        """Sum of squared document lengths of each row: what attention costs, up to a factor."""
        return np.add.reduceat(self.lengths**2, self._starts)

    @property
    def padding_fraction(self) -> float:
        """Share of row positions that hold no document."""
        return 1 - float(self.lengths.sum()) / (len(self) * self.row_tokens)


def prepare(
    path: Path,
    tokenizer: Any,
    row_tokens: int,
    vocab: int,
    cache: Path,
    show_progress: bool = True,
    bad_rows: BadRows = "stop",
) -> PackedSet:
    """Tokenizes and packs a file of `Example` rows, or reads what an earlier call has kept of both.

    Documents longer than a row are never cut: they are dropped, and `dropped` says which.

    Args:
      vocab: tokens that the model knows.
      cache: folder for what is prepared.
      bad_rows: whether rows that cannot be used end the run, or are left out and named in `wrong`.

    Raises:
      UserError: the file is missing or malformed, a token is not in the model's vocabulary, or no document fits a row.
    """
    documents, folder, sha256 = prepared.prepare(path, tokenizer, cache, show_progress, bad_rows)
    name = sources.name(path)
    largest, holder = documents.largest
    if largest >= vocab:
        raise UserError(
            f"{name}: example {holder} holds token {largest}, outside the model's vocabulary of {vocab}; the "
            "tokenizer and the model do not belong together"
        )
    fits = documents.lengths <= row_tokens
    if not fits.any():
        longest = f"; the shortest has {documents.lengths.min() + 1} tokens" if len(documents) else ""
        raise UserError(f"{name}: none of its {len(documents)} examples fits a row of {row_tokens} tokens{longest}")
    dropped = [
        {
            "id": documents.id_of(i),
            "reason": "longer than a row",
            "tokens": int(documents.lengths[i]) + 1,
            "row_tokens": row_tokens,
        }
        for i in np.flatnonzero(~fits)
    ]
    items, stops = _packed(documents.lengths, np.flatnonzero(fits), row_tokens, folder / f"rows{row_tokens}.packed")
    wrong = [{"file": name, "row": number, "reason": reason} for number, reason in documents.wrong]
    return PackedSet(documents, items, stops, row_tokens, dropped, wrong, sha256)


def row_after_row(rows: Sequence[Sequence[int]]) -> tuple[Int32[np.ndarray, " kept"], Int64[np.ndarray, " rows"]]:
    """The items of all rows one after another, and where each row ends among them."""
    stops = np.cumsum([len(row) for row in rows], dtype=np.int64)
    return np.fromiter(itertools.chain.from_iterable(rows), np.int32, int(stops[-1])), stops


def _packed(
    lengths: np.ndarray, kept: np.ndarray, row_tokens: int, path: Path
) -> tuple[Int32[np.ndarray, " kept"], Int64[np.ndarray, " rows"]]:
    """The documents row after row, and where rows end, as `best_fit` packs them; kept in a file."""
    if not path.is_file():
        items, stops = row_after_row(packing.best_fit(lengths[kept].tolist(), row_tokens))
        prepared.save(path, {"items": kept[items].astype(np.int32), "stops": stops})
    found = load_file(path)
    return found["items"], found["stops"]


def write_receipts(path: Path, dropped: Sequence[dict[str, Any]]) -> None:
    """Writes the receipts of dropped documents, a JSON object a line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(receipt) + "\n" for receipt in dropped), encoding="utf-8")


class Dealt(NamedTuple):
    """A global batch: what this process reads of it, and what is known of all of it."""

    batch: Batch  # numpy [batch_rows, T]; rows of other processes look like padding
    ids: tuple[str, ...]  # of all documents
    tokens: int  # positions that documents take, in all rows
    squares: np.ndarray  # float64 [batch_rows], of document lengths, summed over each row; 0 for padding


def batches(
    rows: PackedSet, batch_rows: int, epochs: int, seed: int, window: int = 1, own: Collection[int] | None = None
) -> grain.DatasetIterator:
    """Global batches (`Dealt`) as `Deal` orders them; the last one is filled with padding.

    The order is a pure function of the arguments; `get_state` and `set_state` of the iterator hold the position.

    Args:
      own: rows of a batch, by their place in it, whose tokens this process reads; all by default.
    """
    squares = rows.squares
    deal = Deal(squares, batch_rows, epochs, seed, window)
    empty = packing.empty_row(rows.row_tokens)

    def stack(step: int) -> Dealt:
        here = deal[step]
        mine = range(batch_rows) if own is None else own
        items = [rows.arrays(here[i]) if i < len(here) and i in mine else empty for i in range(batch_rows)]
        arrays = jax.tree.map(lambda *leaves: np.stack(leaves), *items)
        costs = np.concatenate([squares[here], np.zeros(batch_rows - len(here))])
        ids = tuple(name for i in here for name in rows.ids(i))
        return Dealt(arrays, ids, sum(rows.tokens(i) for i in here), costs)

    dataset = grain.MapDataset.range(len(deal)).map(stack)
    return iter(dataset.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=4)))
