"""The table of a sweep: a line a run, as JSON Lines, as CSV, and on the terminal."""

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from jaxdistill import records
from jaxdistill.sweep.grid import COLUMNS


def write(folder: Path, lines: Sequence[Mapping[str, Any]]) -> None:
    """Writes table.jsonl and table.csv, each whole or not at all."""
    records.write_jsonl(folder / "table.jsonl", (dict(line) for line in lines))
    names = list(dict.fromkeys(name for line in lines for name in line))
    with records.whole_file(folder / "table.csv") as file:
        rows = csv.DictWriter(file, names, lineterminator="\n")
        rows.writeheader()
        rows.writerows(lines)


def show(title: str, lines: Sequence[Mapping[str, Any]]) -> None:
    """Prints the values on the axes and what came out."""
    axes = [name for name in COLUMNS if any(name in line for line in lines)]
    shown = Table(title=escape(title))
    for name in (*axes, "accuracy [95% interval]", "held-out loss", "average tokens", "seconds"):
        shown.add_column(name, justify="left" if name in ("variant", "model") else "right")
    for line in lines:
        accuracy = f"{line['accuracy']:.1%} [{100 * line['low']:.1f}, {100 * line['high']:.1f}]"
        loss = "–" if line["heldout_loss"] is None else f"{line['heldout_loss']:.4f}"
        values = [f"{line[name]:,}" if name == "data_size" else str(line[name]) for name in axes]
        shown.add_row(
            *map(escape, values), escape(accuracy), loss, f"{line['average_tokens']:.0f}", f"{line['wall_s']:.0f}"
        )
    Console().print(shown)
