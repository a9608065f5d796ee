"""Documents to rows of fixed length: best-fit packing, and the arrays a row is made of."""

import heapq
from collections.abc import Sequence
from typing import Any

import numpy as np
from flax import struct

from jaxdistill.data.chat import Document

Rows = Any  # [..., T], numpy on the host, jax.Array on devices


@struct.dataclass
class Batch:
    """Packed rows. Targets are shifted here, on the host: position i predicts `targets[i]`, and no device shifts."""

    tokens: Rows  # int32
    targets: Rows  # int32
    positions: Rows  # int32, from 0 within each document
    segments: Rows  # int32, 1, 2, ... within a row; 0 is padding
    lengths: Rows  # int32, of the document that a position belongs to; 0 is padding
    weights: Rows  # float32, of each target in the loss; 0 on prompts and padding


def positions_used(document: Document) -> int:
    """Positions a document takes in a row: its last token is only ever a target."""
    return len(document.tokens) - 1


def best_fit(lengths: Sequence[int], row_tokens: int) -> list[list[int]]:
    """Packs items, longest first, each into the fullest row that still has room; returns item indices by row.

    Rows and the order within a row depend on the lengths alone.

    Raises:
      ValueError: an item is longer than a row; the caller drops those with a receipt, nothing is cut here.
    """
    if lengths and max(lengths) > row_tokens:
        raise ValueError(f"an item of {max(lengths)} tokens does not fit a row of {row_tokens}")
    rows: list[list[int]] = []
    room: dict[int, list[int]] = {}  # free tokens -> a heap of the rows that have so many
    sizes = 0  # bit n is set where some row has n free tokens: one shift finds the least that suffice
    for item in np.argsort(-np.asarray(lengths, np.int64), kind="stable").tolist():
        length = lengths[item]
        enough = sizes >> length
        if enough:
            free = length + (enough & -enough).bit_length() - 1
            row = heapq.heappop(room[free])
            if not room[free]:
                sizes ^= 1 << free
        else:
            free, row = row_tokens, len(rows)
            rows.append([])
        rows[row].append(item)
        if left := free - length:
            heapq.heappush(room.setdefault(left, []), row)
            sizes |= 1 << left
    return rows


def make_row(documents: Sequence[Document], row_tokens: int) -> Batch:
    """One row [T] that holds these documents one after another."""
    row = empty_row(row_tokens)
    at = 0
    for segment, document in enumerate(documents, start=1):
        length = positions_used(document)
        here = slice(at, at + length)
        row.tokens[here] = document.tokens[:-1]
        row.targets[here] = document.tokens[1:]
        row.positions[here] = np.arange(length)
        row.segments[here] = segment
        row.lengths[here] = length
        row.weights[here] = document.trained[1:] * document.weight
        at = here.stop
    return row


def empty_row(row_tokens: int) -> Batch:
    """A row of padding, which no loss sees; fills the last batch."""
    whole = [np.zeros(row_tokens, np.int32) for _ in range(5)]
    return Batch(*whole, weights=np.zeros(row_tokens, np.float32))
