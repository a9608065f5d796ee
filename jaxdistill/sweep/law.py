"""Saturating power laws, y = floor + scale * x**-exponent: least squares, and how sure what they say is."""

import dataclasses

import numpy as np
import scipy.stats
from jaxtyping import Float

from jaxdistill.errors import UserError

CONFIDENCE = 0.95
SIZES = 4  # least number of different x: one more than the law has parameters
_EXPONENTS = np.geomspace(0.01, 10.0, 241)  # looked at first, 2.9% apart
_AROUND = np.linspace(-1.0, 1.0, 15)  # then twice, from one step below the best to one above
_BLOCK = 1 << 22  # numbers held at a time: 32 MiB
_MOST_LEVERAGE = 0.9  # of one run: where it alone decides a parameter its residual says nothing


@dataclasses.dataclass(frozen=True, kw_only=True)
class Interval:
    """A value and where it may be, at 95%."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.4g} [{self.low:.4g}, {self.high:.4g}]"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Laws:
    """R laws; x is counted in units of `unit`, the middle of the runs, where scale and exponent are least tied."""

    unit: float
    floor: Float[np.ndarray, " R"]
    scale: Float[np.ndarray, " R"]
    exponent: Float[np.ndarray, " R"]

    def at(self, x: Float[np.ndarray, " P"]) -> Float[np.ndarray, "R P"]:
        """Values at the points x."""
        return self.floor[:, None] + self.scale[:, None] * (x / self.unit) ** -self.exponent[:, None]


def least_squares(x: Float[np.ndarray, " N"], y: Float[np.ndarray, "R N"], weights: Float[np.ndarray, " N"]) -> Laws:
    """The law of least weighted squares for each row of y, with floor and scale of 0 or more.

    At a given exponent the best floor and scale are those of a line, so the exponent alone is searched over, from 0.01
    to 10: nothing depends on a start, and nothing fails to converge.
    """
    unit = float(np.exp(np.log(x).mean()))
    logs, ends = np.log(x / unit), np.log(_EXPONENTS[[0, -1]])
    rows = max(1, _BLOCK // (len(x) * len(_EXPONENTS)))
    parts = []
    for block in np.split(y, range(rows, len(y), rows)):
        best, step = _best(logs, block, weights, np.log(_EXPONENTS)[None]), np.log(_EXPONENTS[1] / _EXPONENTS[0])
        for _ in range(2):
            best = _best(logs, block, weights, np.clip(best + step * _AROUND, *ends))
            step *= _AROUND[1] - _AROUND[0]
        floor, scale, _ = _lines(logs, block, weights, np.exp(best))
        parts.append(np.concatenate([floor, scale, np.exp(best)], axis=1))
    floor, scale, exponent = np.concatenate(parts).T
    return Laws(unit=unit, floor=floor, scale=scale, exponent=exponent)


def _best(logs: np.ndarray, y: np.ndarray, weights: np.ndarray, tried: np.ndarray) -> np.ndarray:
    """For each row the logarithm [R, 1] of the exponent with the least squares, of those tried [1 or R, K]."""
    lost = _lines(logs, y, weights, np.exp(tried))[2]
    return np.take_along_axis(np.broadcast_to(tried, lost.shape), lost.argmin(axis=1)[:, None], axis=1)


def _lines(logs: np.ndarray, y: np.ndarray, weights: np.ndarray, exponents: np.ndarray) -> tuple[np.ndarray, ...]:
    """Floor, scale and squares [R, K] of the best line through each of R rows at each of K exponents [1 or R, K]."""
    share = weights / weights.sum()
    mean_y = (share * y).sum(axis=1, keepdims=True)
    powers = np.exp(-exponents[:, :, None] * logs)
    mean_p = (share * powers).sum(axis=2)
    off, side = powers - mean_p[:, :, None], (y - mean_y)[:, :, None]
    cross = ((share * off) @ side)[:, :, 0]
    scale = np.maximum(cross, 0.0) / np.maximum((share * off**2).sum(axis=2), 1e-300)
    floor = mean_y - scale * mean_p
    lost = (share * (y - mean_y) ** 2).sum(axis=1, keepdims=True) - scale * cross
    # A floor below 0 is none: the line through the origin
    both = ((share * powers) @ y[:, :, None])[:, :, 0]
    through = both / (share * powers**2).sum(axis=2)
    lost_through = (share * y**2).sum(axis=1, keepdims=True) - through * both
    below = floor < 0
    return np.where(below, 0.0, floor), np.where(below, through, scale), np.where(below, lost_through, lost)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Fit:
    """A law fitted to runs, and resampled."""

    x: Float[np.ndarray, " N"]
    y: Float[np.ndarray, " N"]
    best: Laws  # one
    draws: Laws  # one a resample
    residuals: Float[np.ndarray, " N"]  # of single runs, widened for what the fit takes of them
    relative: bool  # whether the noise is a share of y
    lack_of_fit: float | None  # p that runs of this noise scatter so around the law; None: no x was run twice

    @property
    def floor(self) -> Interval:
        return interval(self.best.floor[0], self.draws.floor)

    @property
    def exponent(self) -> Interval:
        return interval(self.best.exponent[0], self.draws.exponent)

    @property
    def scale(self) -> Interval:
        """Of x itself, not in units."""
        values = [laws.scale * laws.unit**laws.exponent for laws in (self.best, self.draws)]
        return interval(values[0][0], values[1])

    def curve(self, x: Float[np.ndarray, " P"]) -> list[Interval]:
        """What the law says at the points x, if it holds there."""
        (best,), draws = self.best.at(x), self.draws.at(x)
        return [interval(value, draws[:, i]) for i, value in enumerate(best)]

    def new_runs(self, x: float, count: int, seed: int = 0) -> Interval:
        """The mean of so many new runs at x: what the law says there, and the scatter of runs."""
        random, point = np.random.default_rng(seed), np.array([x])
        value, draws = self.best.at(point)[0, 0], self.draws.at(point)[:, 0]
        noise = self.residuals * (value / self.best.at(self.x)[0] if self.relative else 1.0)
        scatter = noise[random.integers(len(self.x), size=(len(draws), count))]
        scatter *= random.choice([-1.0, 1.0], size=scatter.shape)
        return interval(value, draws + scatter.mean(axis=1))


def fit(
    x: Float[np.ndarray, " N"],
    y: Float[np.ndarray, " N"],
    relative: bool = False,
    resamples: int = 2000,
    seed: int = 0,
) -> Fit:
    """Fits a law to runs and resamples it by a wild bootstrap.

    Each resample changes the sign of some runs' residuals, so that a run keeps its x and its own noise. Residuals are
    widened by their leverage (HC3) and by Student's t over the normal quantile; intervals are bias-corrected
    percentiles. Coverage of all this by simulation: docs/experiments.md.

    Args:
      relative: weigh runs by 1 / y**2, for noise that is a share of y; by default all weigh the same.

    Raises:
      UserError: there are too few different x, or something is not a positive number.
    """
    if len(np.unique(x)) < SIZES:
        raise UserError(f"runs have {len(np.unique(x))} different x; a saturating law needs {SIZES} or more")
    if not (np.isfinite(y).all() and (x > 0).all() and (y >= 0).all()) or (relative and not (y > 0).all()):
        raise UserError("x must be above 0, and y 0 or more (with --relative above 0)")
    weights = y**-2.0 if relative else np.ones_like(y)
    best = least_squares(x, y[None], weights)
    (fitted,) = best.at(x)
    spare = len(x) - 3
    wider = scipy.stats.t.ppf((1 + CONFIDENCE) / 2, spare) / scipy.stats.norm.ppf((1 + CONFIDENCE) / 2)
    residuals = wider * (y - fitted) / (1 - np.minimum(_leverage(x, best, weights), _MOST_LEVERAGE))
    signs = np.random.default_rng(seed).choice([-1.0, 1.0], size=(resamples, len(x)))
    draws = least_squares(x, fitted + signs * residuals, weights)
    p_value = _lack_of_fit(x, y, fitted, weights)
    return Fit(x=x, y=y, best=best, draws=draws, residuals=residuals, relative=relative, lack_of_fit=p_value)


def interval(value: float, draws: Float[np.ndarray, " R"]) -> Interval:
    """Bias-corrected percentiles: where resamples lie to one side of the value, the interval goes to the other."""
    beyond = np.clip(((draws < value).mean() + (draws <= value).mean()) / 2, 1 / len(draws), 1 - 1 / len(draws))
    quantiles = scipy.stats.norm.ppf([(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    low, high = np.quantile(draws, scipy.stats.norm.cdf(2 * scipy.stats.norm.ppf(beyond) + quantiles))
    return Interval(value=float(value), low=float(min(low, value)), high=float(max(high, value)))


def _leverage(x: np.ndarray, law: Laws, weights: np.ndarray) -> np.ndarray:
    """How much of its own value each run decides, 0 to 1."""
    powers = (x / law.unit) ** -law.exponent[0]
    slopes = [powers, -law.scale[0] * powers * np.log(x / law.unit)]
    slopes += [np.ones_like(x)] if law.floor[0] > 0 else []
    # By singular vectors: where a law is flat, its exponent moves nothing and has no leverage
    vectors, sizes, _ = np.linalg.svd(np.sqrt(weights)[:, None] * np.stack(slopes, axis=1), full_matrices=False)
    return (vectors[:, sizes > 1e-10 * sizes[0]] ** 2).sum(axis=1)


def _lack_of_fit(x: np.ndarray, y: np.ndarray, fitted: np.ndarray, weights: np.ndarray) -> float | None:
    """F test of the distance of the means from the law against the scatter of runs at the same x."""
    sizes, index, counts = np.unique(x, return_inverse=True, return_counts=True)
    weight = np.bincount(index, weights) / counts  # runs at one x weigh alike here: they have one noise
    means = np.bincount(index, y) / counts
    within = float((weight[index] * (y - means[index]) ** 2).sum())
    repeated, spare = len(x) - len(sizes), len(sizes) - 3
    if not repeated or not within:
        return None
    law = np.bincount(index, fitted) / counts
    between = float((weight * counts * (means - law) ** 2).sum())
    return float(scipy.stats.f.sf((between / spare) / (within / repeated), spare, repeated))
