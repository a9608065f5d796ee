"""The plots of a report, as SVG to put into its page: coloured by the page, the same bytes for the same numbers."""

import contextlib
import io
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, NullLocator

from jaxdistill.evaluate.grade import Summary
from jaxdistill.transparency.index import DIMENSIONS, Score

Curve = Sequence[tuple[int, float]]  # (step of its phase, loss)

# Colours that stand for a variable of the page's style sheet, so that one SVG is right on light and on dark.
INK, MUTED, GRID, SURFACE = "#0000f0", "#0000f1", "#0000f2", "#0000f3"
_SERIES = ("#0000e0", "#0000e1", "#0000e2", "#0000e3", "#0000e4", "#0000e5")
_VARIABLES = {
    INK: "var(--ink)",
    MUTED: "var(--muted)",
    GRID: "var(--line)",
    SURFACE: "var(--surface)",
    **{colour: f"var(--series-{i})" for i, colour in enumerate(_SERIES)},
}
_MARKERS = "osD^vP"
_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",  # text stays text: found by search, drawn in the page's font
    "font.size": 10,
    "text.color": INK,
    "text.parse_math": False,  # a dollar in a name is a dollar
    "axes.edgecolor": GRID,
    "axes.facecolor": "none",
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "figure.facecolor": "none",
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    "xtick.color": GRID,
    "ytick.color": GRID,
    "xtick.labelcolor": MUTED,
    "ytick.labelcolor": MUTED,
    "legend.frameon": False,
}


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
            colour = _SERIES[names.index(phase) % len(_SERIES)]
            for curves, style in kinds.values():
                curve = curves.get(phase, ())
                axes.plot([start + step for step, _ in curve], [loss for _, loss in curve], color=colour, **style)
            if i:
                axes.axvline(start, color=MUTED, linewidth=0.8, linestyle="--")
            axes.text(start, 1.02, phase, color=colour, weight="bold", transform=axes.get_xaxis_transform())
            start += max((step for curves, _ in kinds.values() for step, _ in curves.get(phase, ())), default=0)
        if values and max(values) > 10 * min(values) > 0:
            axes.set_yscale("log")
            _plain_log_ticks(axes, "y", "{x:g}")
        axes.set_xlabel("optimizer step")
        axes.set_ylabel("loss, nats a token")
        axes.legend(handles=[Line2D([], [], color=MUTED, label=kind, **style) for kind, (_, style) in kinds.items()])
        return svg(figure, "losses", "Training and held-out loss by optimizer step")


def inference_time_scaling(summaries: Mapping[str, Summary]) -> str:
    """Accuracy against average output tokens, with intervals; maj@k stands at the tokens of its k samples.

    The view of arXiv 2411.16489: a longer computation is a longer answer or a vote of several.
    """
    with drawing(9.0, 4.0) as (figure, axes):
        for i, (name, summary) in enumerate(summaries.items()):
            colour, marker = _SERIES[i % len(_SERIES)], _MARKERS[i % len(_MARKERS)]
            votes = {f"maj@{k}": (k, estimate) for k, estimate in sorted(summary.maj_at.items()) if k > 1}
            points = {name: (1, summary.accuracy), **votes}
            budgets = [summary.tokens.average * samples for samples, _ in points.values()]
            heights = [100 * estimate.value for _, estimate in points.values()]
            axes.plot(budgets, heights, color=colour, linewidth=1, linestyle=":")
            for label, x, y, (samples, estimate) in zip(points, budgets, heights, points.values(), strict=True):
                first = samples == 1
                axes.errorbar(
                    x,
                    y,
                    yerr=[[max(0.0, y - 100 * estimate.low)], [max(0.0, 100 * estimate.high - y)]],
                    fmt=marker,
                    color=colour,
                    markerfacecolor=colour if first else SURFACE,
                    markersize=8 if first else 6,
                    capsize=3,
                    elinewidth=1.2,
                    label=label if first else None,
                )
                axes.annotate(
                    label,
                    (x, y),
                    xytext=(7, 5),
                    textcoords="offset points",
                    color=colour,
                    weight="bold" if first else "normal",
                    fontsize=10 if first else 8,
                )
        if all(summary.tokens.average > 0 for summary in summaries.values()):
            axes.set_xscale("log")
            _plain_log_ticks(axes, "x", "{x:,.0f}")
            axes.margins(x=0.12)
        axes.set_ylim(-4, 106)
        axes.set_xlabel("average output tokens a problem")
        axes.set_ylabel("accuracy, %")
        axes.legend(loc="center left", bbox_to_anchor=(1, 0.5))
        return svg(figure, "scaling", "Accuracy against average output tokens")


def transparency(scores: Mapping[str, Score]) -> str:
    """Points of the transparency index, one bar a work, the dimensions one after another; open points are hollow."""
    with drawing(9.0, 1.2 + 0.4 * len(scores)) as (figure, axes):
        names = list(scores)
        left = [0] * len(names)
        for i, dimension in enumerate(DIMENSIONS):
            points = [score.by_dimension[dimension].low for score in scores.values()]
            colour = _SERIES[i + 1]
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


def _plain_log_ticks(axes: Axes, which: str, pattern: str) -> None:
    """Ticks at 1, 2 and 5 times the powers of ten, written out."""
    axis = axes.xaxis if which == "x" else axes.yaxis
    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter(pattern)
    axis.set_minor_locator(NullLocator())


@contextlib.contextmanager
def drawing(width: float, height: float) -> Iterator[tuple[Figure, Axes]]:
    """An empty plot, sizes in inches, drawn in our style whatever the user's matplotlibrc says."""
    with matplotlib.rc_context(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from font")  # the reader's browser has the glyph
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(_STYLE)
        figure = Figure(figsize=(width, height), layout="constrained")
        yield figure, figure.add_subplot()


def svg(figure: Figure, name: str, label: str) -> str:
    """The figure as an element of HTML: no prolog, no name spaces, no date, ids that start with `name`."""
    matplotlib.rcParams["svg.hashsalt"] = name
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    text = buffer.getvalue()
    text = re.sub(r' xmlns(:\w+)?="[^"]*"', "", text[text.index("<svg") :], count=2)
    text = re.sub(r'(\bid="|url\(#|href="#)', rf"\1{name}-", text)
    text = re.sub("|".join(_VARIABLES), lambda match: _VARIABLES[match.group()], text)
    return text.replace("<svg ", f'<svg role="img" aria-label="{label}" ', 1)
