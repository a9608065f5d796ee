"""The inference-time-scaling curve: accuracy against average output tokens (the view of arXiv 2411.16489)."""

import dataclasses
import tomllib
from collections.abc import Iterator, Sequence
from pathlib import Path

from matplotlib.axes import Axes

from jaxdistill.evaluate.grade import Summary
from jaxdistill.evaluate.statistics import Estimate, of_counts
from jaxdistill.plots import MARKERS, MUTED, SERIES, SURFACE, drawing, plain_log_ticks, svg

ONE = "one sample"
REFERENCE = "reported"  # of a model that was not sampled here


@dataclasses.dataclass(frozen=True, kw_only=True)
class Point:
    """One way to spend tokens on a problem, and what it is worth."""

    model: str
    how: str  # ONE, maj@k, the name of a budget, or REFERENCE
    tokens: float  # average output tokens a problem, of all k samples for maj@k
    accuracy: Estimate


def points(model: str, summary: Summary, how: str = ONE) -> Iterator[Point]:
    """What one sampling of a model says: single samples, and if they are free also maj@k at the tokens of k samples."""
    yield Point(model=model, how=how, tokens=summary.tokens.average, accuracy=summary.accuracy)
    if how == ONE:
        for k, estimate in sorted(summary.maj_at.items()):
            if k > 1:
                yield Point(model=model, how=f"maj@{k}", tokens=k * summary.tokens.average, accuracy=estimate)


def references(task: str) -> list[Point]:
    """Models that the paper reports on a task; none for most tasks."""
    table = tomllib.loads(Path(__file__).with_name("references.toml").read_text(encoding="utf-8"))
    return [
        Point(
            model=row["name"],
            how=REFERENCE,
            tokens=float(row["tokens"]),
            accuracy=of_counts(float(row["correct"]), row["problems"]),
        )
        for row in table.get(task, [])
    ]


def plot(shown: Sequence[Point], beside: Sequence[Point] = ()) -> str:
    """The curve as SVG: filled single samples, diamonds of forced budgets, hollow maj@k, grey crosses of references."""
    with drawing(9.0, 4.0) as (figure, axes):
        for i, model in enumerate(dict.fromkeys(point.model for point in shown)):
            colour, marker = SERIES[i % len(SERIES)], MARKERS[i % len(MARKERS)]
            own = [point for point in shown if point.model == model]
            free = [point for point in own if point.how == ONE]
            votes = [point for point in own if point.how.startswith("maj@")]
            forced = sorted((p for p in own if p not in free and p not in votes), key=lambda p: p.tokens)
            _line(axes, free + votes, colour, ":")
            _line(axes, sorted(free + forced, key=lambda p: p.tokens) if forced else [], colour, "-")
            for point in forced:
                _mark(axes, point, colour, "d", hollow=False, size=6)
            for point in free + votes:
                _mark(axes, point, colour, marker, hollow=point.how != ONE, size=8 if point.how == ONE else 6)
        for point in beside:
            _mark(axes, point, MUTED, "x", hollow=False, size=6)
        if all(point.tokens > 0 for point in shown):
            axes.set_xscale("log")
            plain_log_ticks(axes, "x", "{x:,.0f}")
            axes.margins(x=0.12)
        axes.set_ylim(-4, 106)
        axes.set_xlabel("average output tokens a problem")
        axes.set_ylabel("accuracy, %")
        axes.legend(loc="center left", bbox_to_anchor=(1, 0.5))
        return svg(figure, "scaling", "Accuracy against average output tokens")


def _line(axes: Axes, line: Sequence[Point], colour: str, style: str) -> None:
    heights = [100 * point.accuracy.value for point in line]
    axes.plot([point.tokens for point in line], heights, color=colour, linewidth=1, linestyle=style)


def _mark(axes: Axes, point: Point, colour: str, marker: str, *, hollow: bool, size: int) -> None:
    """A point with its interval and its name."""
    y, named = 100 * point.accuracy.value, point.how in (ONE, REFERENCE)
    axes.errorbar(
        point.tokens,
        y,
        yerr=[[max(0.0, y - 100 * point.accuracy.low)], [max(0.0, 100 * point.accuracy.high - y)]],
        fmt=marker,
        color=colour,
        markerfacecolor=SURFACE if hollow else colour,
        markersize=size,
        capsize=3,
        elinewidth=1.2,
        label=point.model if point.how == ONE else None,
    )
    axes.annotate(
        point.model if named else point.how,
        (point.tokens, y),
        xytext=(7, 5),
        textcoords="offset points",
        color=colour,
        weight="bold" if point.how == ONE else "normal",
        fontsize=10 if point.how == ONE else 8,
    )
