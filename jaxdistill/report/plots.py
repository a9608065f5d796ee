"""The plots of a report: losses, and the transparency index."""

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.lines import Line2D

from jaxdistill.plots import MUTED, SERIES, SURFACE, drawing, plain_log_ticks, svg
from jaxdistill.transparency.index import DIMENSIONS, Score

Curve = Sequence[tuple[int, float]]  # (step of its phase, loss)


def curves(rows: Mapping[str, Sequence[Mapping[str, float]]], measure: str) -> dict[str, Curve]:
    """One measure of the metrics of several phases, by name; a phase that never logged it has an empty curve."""
    return {name: [(int(row["step"]), row[measure]) for row in found if measure in row] for name, found in rows.items()}


def losses(trained: Mapping[str, Curve], heldout: Mapping[str, Curve], stages: Sequence[str] = ()) -> str:
    """Training loss as lines and held-out loss as points, the phases one after another on one axis of steps.

    A phase that names one of the evaluated `stages` has its colour.
    """
    kinds = {
        "training": (trained, {"linewidth": 1.2}),
        "held-out": (heldout, {"marker": "o", "markerfacecolor": SURFACE, "linestyle": "none"}),
    }
    values = [loss for curves, _ in kinds.values() for curve in curves.values() for _, loss in curve]
    with drawing(9.0, 3.6) as (figure, axes):
        start = 0
        names = list(dict.fromkeys((*stages, *trained, *heldout)))
        for i, phase in enumerate(dict.fromkeys((*trained, *heldout))):
            colour = SERIES[names.index(phase) % len(SERIES)]
            for curves, style in kinds.values():
                curve = curves.get(phase, ())
                axes.plot([start + step for step, _ in curve], [loss for _, loss in curve], color=colour, **style)
            if i:
                axes.axvline(start, color=MUTED, linewidth=0.8, linestyle="--")
            axes.text(start, 1.02, phase, color=colour, weight="bold", transform=axes.get_xaxis_transform())
            start += max((step for curves, _ in kinds.values() for step, _ in curves.get(phase, ())), default=0)
        if values and max(values) > 10 * min(values) > 0:
            axes.set_yscale("log")
            plain_log_ticks(axes, "y", "{x:g}")
        axes.set_xlabel("optimizer step")
        axes.set_ylabel("loss, nats a token")
        axes.legend(handles=[Line2D([], [], color=MUTED, label=kind, **style) for kind, (_, style) in kinds.items()])
        return svg(figure, "losses", "Training and held-out loss by optimizer step")


def transparency(scores: Mapping[str, Score]) -> str:
    """Points of the transparency index, one bar a work, the dimensions one after another; open points are hollow."""
    with drawing(9.0, 1.2 + 0.4 * len(scores)) as (figure, axes):
        names = list(scores)
        left = [0] * len(names)
        for i, dimension in enumerate(DIMENSIONS):
            points = [score.by_dimension[dimension].low for score in scores.values()]
            colour = SERIES[i + 1]
            axes.barh(names, points, left=left, color=colour, height=0.6, label=dimension.replace("_", " "))
            left = [start + width for start, width in zip(left, points, strict=True)]
        totals = [score.total for score in scores.values()]
        open_points = [total.high - total.low for total in totals]
        if any(open_points):
            empty: dict[str, Any] = {"facecolor": "none", "edgecolor": MUTED, "linestyle": ":"}
            axes.barh(names, open_points, left=left, height=0.6, label="open", **empty)
        for row, total in enumerate(totals):
            axes.text(total.high + 1, row, str(total), va="center", weight="bold")
        axes.invert_yaxis()
        axes.set_xlim(0, 112)
        axes.set_xticks(range(0, 101, 20))
        axes.set_xlabel("points of 100")
        axes.grid(visible=False, axis="y")
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.35 if len(scores) < 4 else -0.18), ncols=5)
        return svg(figure, "transparency", "Points of the transparency index by work and dimension")
