"""Plots as SVG, to put into a page that colours them or into a file: the same bytes for the same numbers."""

import contextlib
import io
import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator

# Colours that stand for a variable of the page's style sheet, so that one SVG is right on light and on dark.
INK, MUTED, GRID, SURFACE = "#0000f0", "#0000f1", "#0000f2", "#0000f3"
SERIES = ("#0000e0", "#0000e1", "#0000e2", "#0000e3", "#0000e4", "#0000e5")
_VARIABLES = {
    INK: "var(--ink)",
    MUTED: "var(--muted)",
    GRID: "var(--line)",
    SURFACE: "var(--surface)",
    **{colour: f"var(--series-{i})" for i, colour in enumerate(SERIES)},
}
MARKERS = "osD^vP"
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


def plain_log_ticks(axes: Axes, which: str, pattern: str) -> None:
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


def standalone(figure: Figure, name: str, label: str) -> str:
    """The figure as a file of its own, with the colours of our pages: light or dark as the reader has it."""
    style = Path(__file__).with_name("style.css.jinja").read_text(encoding="utf-8")
    colours = style[: style.index("\n* {")]  # what comes before the first rule that is no set of colours
    names = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
    text = svg(figure, name, label).replace("<svg ", f"<svg {names} ", 1)
    start = text.index(">", text.index("<svg ")) + 1
    ground = "svg { background: var(--surface); font-family: system-ui, sans-serif; }"
    return f"{text[:start]}\n<style>{colours}\n{ground}</style>{text[start:]}"
