"""Figures of sweeps: a law through its runs, and variants side by side. Each is a file of its own."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from jaxdistill.plots import MARKERS, MUTED, SERIES, SURFACE, drawing, plain_log_ticks, standalone

if TYPE_CHECKING:
    from jaxdistill.sweep.fit import Result

_POINTS = 120  # of a curve


def scaling_law(results: Sequence["Result"], x: str, y: str) -> str:
    """Runs as dots, laws as lines with their bands, dashed where no run is, and the floor as a dotted line."""
    with drawing(9.0, 4.4) as (figure, axes):
        lowest = min(float(result.fit.y.min()) for result in results)
        for i, result in enumerate(results):
            colour, fit = SERIES[(i + 1) % len(SERIES)], result.fit
            last = max(float(fit.x.max()), *(one.x for one in result.predictions))
            points = np.geomspace(fit.x.min(), last, _POINTS)
            said = fit.curve(points)
            axes.fill_between(
                points, [s.low for s in said], [s.high for s in said], color=colour, alpha=0.15, linewidth=0
            )
            inside = points <= fit.x.max()
            values = np.array([s.value for s in said])
            axes.plot(points[inside], values[inside], color=colour, label=f"{result.name}: exponent {fit.exponent}")
            axes.plot(points[~inside], values[~inside], color=colour, linestyle="--")
            axes.axhline(fit.floor.value, color=colour, linestyle=":", linewidth=0.8)
            marker = MARKERS[i % len(MARKERS)]
            axes.plot(fit.x, fit.y, marker, color=colour, markerfacecolor=SURFACE, markersize=5)
            for one in result.predictions:
                off = [[max(0.0, one.run.value - one.run.low)], [max(0.0, one.run.high - one.run.value)]]
                axes.errorbar(one.x, one.run.value, yerr=off, fmt="none", color=colour, capsize=3, elinewidth=1)
        axes.set_xscale("log")
        plain_log_ticks(axes, "x", "{x:,.0f}")
        if lowest > 0:
            axes.set_yscale("log")
            plain_log_ticks(axes, "y", "{x:g}")
        axes.set_xlabel(x.replace("_", " "))
        axes.set_ylabel(y.replace("_", " "))
        axes.legend(loc="best")
        label = f"{y} against {x}: runs, the fitted law with its 95% band, and single runs beyond"
        return standalone(figure, "fit", label.replace("_", " "))


def variants(values: Mapping[str, Sequence[tuple[float, float, float]]], label: str) -> str:
    """One row a variant: each run's value with its interval, and their mean as a bar.

    Args:
      values: by variant, (value, low, high) of each run, shares of 1.
    """
    with drawing(9.0, 0.9 + 0.5 * len(values)) as (figure, axes):
        names = list(values)
        for row, name in enumerate(names):
            runs = np.array(values[name])
            axes.barh(row, 100 * runs[:, 0].mean(), height=0.7, color=SERIES[0], alpha=0.3)
            for i, (value, low, high) in enumerate(runs):
                at = row + 0.18 * (i - (len(runs) - 1) / 2)
                off = [[100 * max(0.0, value - low)], [100 * max(0.0, high - value)]]
                axes.errorbar(100 * value, at, xerr=off, fmt="o", color=SERIES[2], markersize=4, elinewidth=1)
            axes.text(101, row, f"{100 * runs[:, 0].mean():.1f}", va="center", color=MUTED)
        axes.set_yticks(range(len(names)), names)
        axes.invert_yaxis()
        axes.set_xlim(0, 108)
        axes.set_xticks(range(0, 101, 20))
        axes.grid(visible=False, axis="y")
        axes.set_xlabel(f"{label}, %")
        return standalone(figure, "variants", f"{label} by variant, a point a run with its 95% interval")
