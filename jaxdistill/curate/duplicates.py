"""Finds problems that say the same: equal tokens, then MinHash (rensa) for candidates, each confirmed on the texts.

Fingerprints go to a file and are compared one column at a time, so that memory grows by 8 bytes a problem.
"""

import hashlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
from rensa import RMinHash  # pyright: ignore[reportAttributeAccessIssue]

from jaxdistill.curate.text import shingles

SHINGLE_TOKENS = 3
BANDS, ROWS = 16, 7  # two problems of Jaccard similarity 0.8 share a band with probability 0.98, of 0.4 with 0.03
_SEED, _BATCH = 20241125, 2048
_COLUMNS = 1 + BANDS


class Fingerprints:
    """Collects one row a problem, in order, then names the pairs that may be duplicates."""

    def __init__(self, path: Path):
        self._path = path
        self._file = path.open("wb")
        self._waiting: list[list[str]] = []
        self._mix = np.random.default_rng(_SEED).integers(1, 1 << 63, size=ROWS, dtype=np.uint64) | np.uint64(1)

    def add(self, words: list[str]) -> None:
        """Takes the tokens of the next problem."""
        self._waiting.append(words)
        if len(self._waiting) == _BATCH:
            self._flush()

    def _flush(self) -> None:
        if not self._waiting:
            return
        sets = [shingles(words, SHINGLE_TOKENS) or [""] for words in self._waiting]
        digests = RMinHash.digests_from_token_sets(sets, num_perm=BANDS * ROWS, seed=_SEED)
        bands = np.array(digests, dtype=np.uint64).reshape(len(sets), BANDS, ROWS)
        table = np.empty((len(sets), _COLUMNS), dtype=np.uint64)
        table[:, 0] = [_hash(words) for words in self._waiting]
        # A hash of the band's seven minima, which wraps around, and of all numbers: problems of one template, of which
        # a large pool holds thousands, are no candidates.
        numbers = [_hash(sorted(filter(_is_number, words))) for words in self._waiting]
        table[:, 1:] = (bands * self._mix).sum(-1) ^ np.array(numbers, dtype=np.uint64)[:, None]
        self._file.write(table.tobytes())
        self._waiting.clear()

    def exact_pairs(self) -> Iterator[tuple[int, int]]:
        """(first, later) of problems with equal tokens."""
        yield from self._pairs(0)

    def candidate_pairs(self) -> Iterator[tuple[int, int]]:
        """(earlier, later) of problems that share a band and all numbers; a pair may come more than once."""
        for column in range(1, _COLUMNS):
            yield from self._pairs(column)

    def _pairs(self, column: int) -> Iterator[tuple[int, int]]:
        self._flush()
        self._file.flush()
        if not self._path.stat().st_size:
            return
        values = np.memmap(self._path, dtype=np.uint64, mode="r").reshape(-1, _COLUMNS)[:, column]
        order = np.argsort(values, kind="stable")
        ordered = values[order]
        starts = np.flatnonzero(np.concatenate(([True], ordered[1:] != ordered[:-1])))
        for start, end in zip(starts, np.append(starts[1:], len(order)), strict=True):
            for position in range(start + 1, end):
                yield int(order[start]), int(order[position])
                if position - 1 > start:
                    yield int(order[position - 1]), int(order[position])

    def close(self) -> None:
        """Removes the file."""
        self._file.close()
        self._path.unlink(missing_ok=True)


def _hash(words: Sequence[str]) -> int:
    return int.from_bytes(hashlib.blake2b(" ".join(words).encode(), digest_size=8).digest(), "little")


def same_problem(one: Sequence[str], other: Sequence[str], least_jaccard: float) -> float | None:
    """Jaccard similarity of two statements' runs of 3 tokens if they are one problem, else None.

    Problems that differ in a number are two problems, however alike they are.
    """
    if Counter(filter(_is_number, one)) != Counter(filter(_is_number, other)):
        return None
    runs, others = set(shingles(one, SHINGLE_TOKENS)), set(shingles(other, SHINGLE_TOKENS))
    jaccard = len(runs & others) / max(1, len(runs | others))
    return jaccard if jaccard >= least_jaccard else None


def _is_number(token: str) -> bool:
    return token[0].isdigit()


def find_duplicates(
    fingerprints: Fingerprints, confirm: Callable[[int, int], str | None]
) -> dict[int, tuple[int, str, str]]:
    """By number of each duplicate: the kept problem's number, the reason (duplicate, near_duplicate), and a detail.

    `confirm` looks at two problems and says why they are one, or None. Of a group the first is kept.
    """
    found: dict[int, tuple[int, str, str]] = {}

    def kept(number: int) -> int:
        while number in found:
            number = found[number][0]
        return number

    for first, later in fingerprints.exact_pairs():
        found.setdefault(later, (kept(first), "duplicate", "equal tokens"))
    seen: set[tuple[int, int]] = set()
    for earlier, later in fingerprints.candidate_pairs():
        if later in found or (pair := (kept(earlier), later)) in seen or pair[0] >= later:
            continue
        seen.add(pair)
        if detail := confirm(*pair):
            found[later] = (pair[0], "near_duplicate", detail)
    return found
