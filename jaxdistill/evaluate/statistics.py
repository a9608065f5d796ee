"""How sure the scores are: avg@n, pass@k, maj@k and best of k with 95% intervals, and paired tests of two models."""

import dataclasses
import math
from collections.abc import Hashable, Sequence
from typing import Literal

import numpy as np
import scipy.stats

RESAMPLES = 10_000
CONFIDENCE = 0.95
_BLOCK = 1 << 22  # indices drawn at a time: 32 MiB


@dataclasses.dataclass(frozen=True, kw_only=True)
class Estimate:
    """A mean over problems and its 95% interval, all between 0 and 1."""

    value: float
    low: float
    high: float
    n_problems: int
    n_samples: int  # over all problems

    def __str__(self) -> str:
        return f"{100 * self.value:.1f}% [{100 * self.low:.1f}, {100 * self.high:.1f}]"


@dataclasses.dataclass(frozen=True, kw_only=True)
class PairedTest:
    """Exact McNemar test: how often two models differ on the same problems, and two-sided p."""

    first_only: int  # problems that only the first model solved
    second_only: int
    p_value: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class PairedDifference:
    """By how much the second of two models is better on the same problems: a mean, its 95% interval, two-sided p."""

    value: float  # -1 to 1
    low: float
    high: float
    p_value: float  # of the sign-flip test over problems; with one sample a problem it is McNemar's
    n_problems: int

    @property
    def in_noise(self) -> bool:
        """Whether chance alone may well have made it."""
        return self.p_value >= 1 - CONFIDENCE or self.low <= 0 <= self.high

    def __str__(self) -> str:
        return f"{100 * self.value:+.1f} points [{100 * self.low:+.1f}, {100 * self.high:+.1f}], p = {self.p_value:.2g}"


def avg_at_n(correct: Sequence[Sequence[bool]], seed: int = 0) -> Estimate:
    """Mean over problems of the share of correct samples; one inner sequence for each problem."""
    _check(correct, 1)
    return estimate([sum(samples) / len(samples) for samples in correct], sum(map(len, correct)), seed)


def pass_at_k(correct: Sequence[Sequence[bool]], k: int, seed: int = 0) -> Estimate:
    """Chance that one of k samples is correct: unbiased, 1 - C(n - c, k) / C(n, k) (Chen et al., arXiv 2107.03374)."""
    _check(correct, k)
    values = [1 - math.comb(len(s) - sum(s), k) / math.comb(len(s), k) for s in correct]
    return estimate(values, sum(map(len, correct)), seed)


def maj_at_k(
    classes: Sequence[Sequence[Hashable | None]],
    right: Sequence[Hashable],
    k: int,
    ties: Literal["expected", "strict"] = "expected",
    seed: int = 0,
) -> Estimate:
    """Chance that the most frequent answer among k samples is right, exactly, over all subsets of k of the n samples.

    Args:
      classes: for each problem the answer class of each sample; None is a sample without an answer: it has no vote.
      right: for each problem the class of the right answer.
      ties: "expected" gives a tie of t classes 1/t of a point, as drawing one of them would; "strict" gives it none.
    """
    _check(classes, k)
    values = [_majority(samples, gold, k, ties) for samples, gold in zip(classes, right, strict=True)]
    return estimate(values, sum(map(len, classes)), seed)


def _majority(samples: Sequence[Hashable | None], right: Hashable, k: int, ties: str) -> float:
    """Sums over j, the votes for the right class, the number of subsets in which no other class has more."""
    counts: dict[Hashable, int] = {}
    for answer in samples:
        if answer is not None:
            counts[answer] = counts.get(answer, 0) + 1
    n_right, n_silent = counts.pop(right, 0), sum(answer is None for answer in samples)
    points = 0.0
    for j in range(1, min(n_right, k) + 1):
        for tied, ways in enumerate(_ways(tuple(counts.values()), n_silent, k - j, j)):
            if tied == 0 or ties == "expected":
                points += math.comb(n_right, j) * ways / (1 + tied) / math.comb(len(samples), k)
    return points


def _ways(counts: Sequence[int], n_silent: int, size: int, most: int) -> list[int]:
    """Number of ways to draw `size` samples with at most `most` of each class, by how many classes reach `most`."""
    limit = size // most
    table = [[math.comb(n_silent, drawn)] + [0] * limit for drawn in range(size + 1)]  # [drawn][classes with most]
    for count in counts:
        new = [[0] * (limit + 1) for _ in range(size + 1)]
        for drawn in range(size + 1):
            for take in range(min(count, most, drawn) + 1):
                ways, reaches = math.comb(count, take), int(take == most)
                for tied in range(limit + 1 - reaches):
                    new[drawn][tied + reaches] += ways * table[drawn - take][tied]
        table = new
    return table[size]


def mcnemar(first: Sequence[bool], second: Sequence[bool]) -> PairedTest:
    """Compares two models on the same problems, one outcome each; problems on which they agree carry no weight."""
    first_only = sum(a and not b for a, b in zip(first, second, strict=True))
    second_only = sum(b and not a for a, b in zip(first, second, strict=True))
    n = first_only + second_only
    p_value = float(scipy.stats.binomtest(first_only, n).pvalue) if n else 1.0
    return PairedTest(first_only=first_only, second_only=second_only, p_value=p_value)


def paired_difference(first: Sequence[float], second: Sequence[float], seed: int = 0) -> PairedDifference:
    """Compares two models by one value a problem, such as the share of its samples that are right, in the same order.

    Problems are resampled with both models' values together, so what makes a problem hard for both cancels. Where all
    differences are equal the bootstrap would claim certainty: the interval is then as wide as the share of problems
    that may differ and yet not show, by Wilson.
    """
    if not first or len(first) != len(second):
        raise ValueError(f"{len(first)} and {len(second)} values; expected as many of both, and at least one")
    differences = np.subtract(second, first)
    value = float(differences.mean())
    if np.ptp(differences) < 1e-12:
        unseen = _wilson(0.0, len(differences))[1]
        low, high = max(-1.0, value - unseen), min(1.0, value + unseen)
    else:
        low, high = _interval(differences, seed)
    p_value = _sign_flip(differences[differences != 0], seed)
    return PairedDifference(value=value, low=float(low), high=float(high), p_value=p_value, n_problems=len(first))


def _sign_flip(differences: np.ndarray, seed: int) -> float:
    """Two-sided p of differences whose signs are chance; exact up to 13 of them, or where all are of one size."""
    if not differences.size:
        return 1.0
    if np.ptp(np.abs(differences)) < 1e-12:
        return float(scipy.stats.binomtest(int((differences > 0).sum()), len(differences)).pvalue)
    test = scipy.stats.permutation_test(
        (differences,),
        np.mean,
        permutation_type="samples",
        vectorized=True,
        n_resamples=RESAMPLES - 1,
        batch=max(1, _BLOCK // len(differences)),
        rng=np.random.default_rng(seed),
    )
    return float(test.pvalue)


def best_of_k(correct: Sequence[Sequence[bool]], scores: Sequence[Sequence[float]], k: int, seed: int = 0) -> Estimate:
    """Chance that the sample that another judge scores highest among k is correct, exactly, over all subsets of k.

    Equal scores share: one of the best is drawn.

    Args:
      scores: of a reward model, say; like `correct`, one inner sequence for each problem.
    """
    _check(correct, k)
    values = [_best(right, given, k) for right, given in zip(correct, scores, strict=True)]
    return estimate(values, sum(map(len, correct)), seed)


def _best(right: Sequence[bool], scores: Sequence[float], k: int) -> float:
    """Sums over the distinct scores the chance that it is the highest, times the share of right ones with it."""
    points, below = 0.0, 0
    for score in sorted(set(scores)):
        group = [ok for ok, given in zip(right, scores, strict=True) if given == score]
        upto = below + len(group)
        chance = (math.comb(upto, k) - math.comb(below, k)) / math.comb(len(right), k)
        points += chance * sum(group) / len(group)
        below = upto
    return points


def estimate(values: Sequence[float], n_samples: int, seed: int = 0) -> Estimate:
    """The mean of one value a problem, with its interval.

    Wilson where every value is 0 or 1 (one sample a problem, for example), else a percentile bootstrap over problems:
    the samples of one problem are not independent, the problems are. Where all values are equal the bootstrap
    would claim certainty, so Wilson over the problems stands in, on the safe side of a fractional count.
    """
    if not values:
        raise ValueError("no problems to average over; expected at least one")
    array = np.asarray(values, np.float64)
    mean = float(array.mean())
    if np.isin(array, (0.0, 1.0)).all() or np.ptp(array) < 1e-12:
        low, high = _wilson(float(array.sum()), len(array))
    else:
        low, high = _interval(array, seed)
    return Estimate(value=mean, low=float(low), high=float(high), n_problems=len(array), n_samples=n_samples)


def of_counts(correct: float, problems: int) -> Estimate:
    """One answer a problem, of which so many are right: with Wilson's interval, on the safe side of a fraction."""
    low, high = _wilson(correct, problems)
    return Estimate(value=correct / problems, low=low, high=high, n_problems=problems, n_samples=problems)


def _wilson(successes: float, n: int) -> tuple[float, float]:
    few, many = math.floor(successes + 1e-9), math.ceil(successes - 1e-9)
    low, high = (scipy.stats.binomtest(s, n).proportion_ci(CONFIDENCE, method="wilson") for s in (few, many))
    return low.low, high.high


def _interval(values: np.ndarray, seed: int) -> tuple[float, float]:
    """Of the mean, by a percentile bootstrap over problems."""
    low, high = np.quantile(_resampled_means(values, seed), [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return float(low), float(high)


def _resampled_means(values: np.ndarray, seed: int) -> np.ndarray:
    random = np.random.default_rng(seed)
    rows = max(1, min(RESAMPLES, _BLOCK // len(values)))
    means = [
        values[random.integers(len(values), size=(min(rows, RESAMPLES - start), len(values)))].mean(axis=1)
        for start in range(0, RESAMPLES, rows)
    ]
    return np.concatenate(means)


def _check(samples: Sequence[Sequence[object]], k: int) -> None:
    fewest = min(map(len, samples), default=0)
    if not 1 <= k <= fewest:
        raise ValueError(f"k is {k}, but the problem with the fewest samples has {fewest}; expected 1 <= k <= {fewest}")
