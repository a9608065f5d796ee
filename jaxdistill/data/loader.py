"""Example files to batches: tokenize, drop what does not fit with a receipt, pack, deal in an order that resumes."""

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, SupportsIndex

import grain
import jax
import numpy as np
from rich.progress import track

from jaxdistill import records
from jaxdistill.data import chat, packing
from jaxdistill.data.chat import Document
from jaxdistill.data.dealing import Deal
from jaxdistill.data.packing import Batch
from jaxdistill.errors import UserError


@dataclasses.dataclass(frozen=True)
class PackedSet:
    """A data set packed into rows, in memory."""

    documents: list[Document]
    rows: list[list[int]]  # indices of documents
    row_tokens: int
    dropped: list[dict[str, Any]]  # a receipt for each document that is longer than a row

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: SupportsIndex) -> tuple[Batch, tuple[str, ...]]:
        """The arrays of a row, and the ids of its documents."""
        documents = [self.documents[i] for i in self.rows[int(index)]]
        return packing.make_row(documents, self.row_tokens), tuple(d.id for d in documents)

    def fingerprint(self) -> str:
        """SHA-256 of all that a batch can hold: tokens, what is trained, weights, and how rows are packed."""
        digest = hashlib.sha256(json.dumps([self.row_tokens, self.rows]).encode())
        for d in self.documents:
            digest.update(f"{d.id} {d.weight} {len(d.tokens)}".encode() + d.tokens.tobytes() + d.trained.tobytes())
        return digest.hexdigest()

    @property
    def trained_tokens(self) -> int:
        """Tokens with loss in one epoch."""
        return sum(int(d.trained[1:].sum()) for d in self.documents)

    @property
    def lengths(self) -> np.ndarray:
        """Positions of each document, float64."""
        return np.array([packing.positions_used(d) for d in self.documents], dtype=np.float64)

    @property
    def attended_tokens(self) -> float:
        """Document length averaged over the tokens of the rows: the `attended` of Config.flops_per_token."""
        return float(self.squares.sum() / max(self.lengths.sum(), 1))

    @property
    def squares(self) -> np.ndarray:
        """Sum of squared document lengths of each row: what attention costs, up to a factor."""
        squares = self.lengths**2
        return np.array([squares[row].sum() for row in self.rows])

    @property
    def padding_fraction(self) -> float:
        """Share of row positions that hold no document."""
        return 1 - float(self.lengths.sum()) / (len(self.rows) * self.row_tokens)


def prepare(path: Path, tokenizer: Any, row_tokens: int, vocab: int, show_progress: bool = True) -> PackedSet:
    """Tokenizes and packs a file of `Example` rows.

    Documents longer than a row are never cut: they are dropped, and `dropped` says which.

    Raises:
      UserError: the file is missing or malformed, a token is not in the model's vocabulary, or no document fits a row.
    """
    examples = list(records.read_jsonl(path, records.Example))
    steps = track(examples, f"tokenize {path.name}", transient=True, disable=not show_progress)
    documents = [chat.tokenize(tokenizer, example) for example in steps]
    for d in documents:
        if (largest := int(d.tokens.max())) >= vocab:
            raise UserError(
                f"{path}: example {d.id} holds token {largest}, outside the model's vocabulary of {vocab}; the "
                "tokenizer and the model do not belong together"
            )
    too_long = [d for d in documents if packing.positions_used(d) > row_tokens]
    kept = [d for d in documents if packing.positions_used(d) <= row_tokens]
    if not kept:
        longest = f"; the shortest has {min(len(d.tokens) for d in documents)} tokens" if documents else ""
        raise UserError(f"{path}: none of its {len(documents)} examples fits a row of {row_tokens} tokens{longest}")
    dropped = [
        {"id": d.id, "reason": "longer than a row", "tokens": len(d.tokens), "row_tokens": row_tokens} for d in too_long
    ]
    rows = packing.best_fit([packing.positions_used(d) for d in kept], row_tokens)
    return PackedSet(documents=kept, rows=rows, row_tokens=row_tokens, dropped=dropped)


def write_receipts(path: Path, dropped: Sequence[dict[str, Any]]) -> None:
    """Writes the receipts of dropped documents, a JSON object a line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(receipt) + "\n" for receipt in dropped), encoding="utf-8")


def batches(rows: PackedSet, batch_rows: int, epochs: int, seed: int, window: int = 1) -> grain.DatasetIterator:
    """Global batches ([batch_rows, T], document ids) as `Deal` orders them; the last one is filled with padding.

    The order is a pure function of the arguments; `get_state` and `set_state` of the iterator hold the position.
    """
    deal = Deal(rows.squares, batch_rows, epochs, seed, window)

    def stack(step: int) -> tuple[Batch, tuple[str, ...]]:
        items = [rows[i] for i in deal[step]]
        padding = [packing.empty_row(rows.row_tokens)] * (batch_rows - len(items))
        arrays = jax.tree.map(lambda *leaves: np.stack(leaves), *[batch for batch, _ in items], *padding)
        return arrays, tuple(id_ for _, ids in items for id_ in ids)

    dataset = grain.MapDataset.range(len(deal)).map(stack)
    return iter(dataset.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=4)))
