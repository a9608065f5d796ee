"""Which rows go into which step: at random, but so that the rows of a step cost about the same."""

import functools
from collections.abc import Sequence
from typing import SupportsIndex

import numpy as np


class Deal(Sequence[np.ndarray]):
    """Indices of rows by step, for a number of epochs; a pure function of its arguments.

    Devices that work on a step's rows wait for the slowest. All rows have the same length, so they differ by the sum of
    their squared document lengths alone. Each epoch is a shuffle of its own, and epochs follow one another without a
    gap. Of every `window` steps the rows are sorted by cost and cut into the steps, which are then shuffled. So a row
    comes less than `window` steps from where the shuffle had put it and every window is a fair sample of the data, but
    the rows of one step are alike. With a window of 1 nothing is sorted.

    Args:
      costs: of each row; any scale.
      rows: in a step; the last step may have fewer.
    """

    def __init__(self, costs: np.ndarray, rows: int, epochs: int, seed: int, window: int):
        self._costs, self._rows, self._seed, self._window = costs, rows, seed, window
        self._total = len(costs) * epochs
        # A run goes through both in order: the last ones asked for are enough
        self._shuffle = functools.lru_cache(2)(self._shuffle_epoch)
        self._deal = functools.lru_cache(1)(self._deal_window)

    def __len__(self) -> int:
        return -(-self._total // self._rows)

    def __getitem__(self, step: SupportsIndex) -> np.ndarray:  # type: ignore[override]
        window, within = divmod(range(len(self))[int(step)], self._window)
        return self._deal(window)[within * self._rows : (within + 1) * self._rows]

    def _shuffle_epoch(self, epoch: int) -> np.ndarray:
        return np.random.default_rng([self._seed, 0, epoch]).permutation(len(self._costs))

    def _deal_window(self, window: int) -> np.ndarray:
        size, count = self._window * self._rows, len(self._costs)
        first, end = window * size, min((window + 1) * size, self._total)
        epochs = range(first // count, (end - 1) // count + 1)
        start = first - epochs.start * count
        rows = np.concatenate([self._shuffle(epoch) for epoch in epochs])[start : start + end - first]
        if self._window == 1:
            return rows
        rows = rows[np.argsort(self._costs[rows], kind="stable")]
        whole = len(rows) // self._rows
        order = np.random.default_rng([self._seed, 1, window]).permutation(whole)
        steps = rows[: whole * self._rows].reshape(whole, self._rows)[order]
        return np.concatenate([steps.ravel(), rows[whole * self._rows :]])
