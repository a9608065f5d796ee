"""The pipeline as a drawing: a box for each run folder, with its counts and its dollars, and arrows to its readers."""

import textwrap

from matplotlib.patches import Rectangle

from jaxdistill.lineage import Lineage, Stage
from jaxdistill.plots import INK, MUTED, SURFACE, drawing, svg

_COLUMN, _ROW = 2.7, 1.3  # inches from box to box
_WIDTH, _HEIGHT = 2.1, 1.0  # of a box
_CHARACTERS = 30  # of a line in a box


def pipeline(lineage: Lineage) -> str:
    """The stages, sources on the left; a stage stands right of all that it read from."""
    column: dict[str, int] = {}
    rows: dict[int, int] = {}
    places: dict[str, tuple[float, float]] = {}
    for folder, stage in lineage.stages.items():  # sources come first
        behind = [column[str(i.maker)] for i in stage.inputs if i.maker is not None]
        at = column[str(folder)] = 1 + max(behind, default=-1)
        rows[at] = rows.get(at, 0) + 1
        places[str(folder)] = (at * _COLUMN, -(rows[at] - 1) * _ROW)
    width, height = (max(rows) + 1) * _COLUMN, max(rows.values()) * _ROW
    with drawing(width, height) as (figure, axes):
        axes.set_axis_off()
        axes.set_xlim(-_WIDTH / 2 - 0.1, width - _WIDTH / 2)
        axes.set_ylim(-height + _ROW / 2, _ROW / 2)
        for folder, stage in lineage.stages.items():
            x, y = places[str(folder)]
            for maker in dict.fromkeys(i.maker for i in stage.inputs if i.maker is not None):
                start_x, start_y = places[str(maker)]
                tail, head = (start_x + _WIDTH / 2, start_y), (x - _WIDTH / 2, y)
                arrow = {"arrowstyle": "->", "color": MUTED, "linewidth": 0.8, "shrinkA": 0, "shrinkB": 0}
                axes.annotate("", head, tail, arrowprops=arrow, zorder=1)
            corner = (x - _WIDTH / 2, y - _HEIGHT / 2)
            axes.add_patch(Rectangle(corner, _WIDTH, _HEIGHT, facecolor=SURFACE, edgecolor=MUTED, zorder=2))
            axes.text(x, y, _label(lineage, stage), ha="center", va="center", fontsize=7, color=INK)
        return svg(figure, "pipeline", "The pipeline: run folders and what they read from one another")


def _label(lineage: Lineage, stage: Stage) -> str:
    """Command, folder, counts and cost, in short lines."""
    counts = ", ".join(f"{count:,} {name}" for name, count in stage.counts.items() if count)
    cost = "" if stage.cost_usd is None else f"${stage.cost_usd:,.2f}"
    words = [stage.command, textwrap.shorten(lineage.name(stage.folder), _CHARACTERS, placeholder="..."), counts, cost]
    return "\n".join("\n".join(textwrap.wrap(word, _CHARACTERS)) for word in words if word)
