"""Two sweeps on the demo's task: how much from how many chains, and what each part of the recipe is worth.

    .venv/bin/python benchmarks/sweeps.py        (about an hour on 2 CPU cores; run again to go on)

Writes docs/sweep_error.svg, docs/sweep_loss.svg, docs/sweep_ablations.svg, and benchmarks/results/sweeps.md with the
tables, which benchmarks/results/sweep_data_size.jsonl and sweep_ablations.jsonl hold too.
"""

import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxdistill.sweep import figure
from jaxdistill.sweep.fit import load, read_table

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
FITS = {"error": ("error", []), "heldout_loss": ("loss", ["--relative"])}  # y -> name of the figure, options


def main(arguments: Sequence[str] = ()) -> None:
    """Runs what is missing, fits, draws and writes.

    Args:
      arguments: of both sweeps.
    """
    size, ablations = (_sweep(name, arguments) for name in ("sweep_data_size", "sweep_ablations"))
    lines = [
        "# Sweeps on the demo's task",
        "",
        (
            f"Command: `.venv/bin/python benchmarks/sweeps.py`; commits: {_commits(size + ablations)}; "
            f"{os.cpu_count()} cores, {platform.machine()}; {_seconds(size)} s for the {len(size)} runs of data "
            f"sizes, {_seconds(ablations)} s for the {len(ablations)} of ablations."
        ),
        "",
        "## Data size",
        "",
        *_table(size, "data_size"),
        "",
    ]
    for y, (name, options) in FITS.items():
        table = ROOT / "runs" / "sweep_data_size" / "table.jsonl"
        _run("fit", str(table), "--y", y, *options)
        folder = table.parent / f"fit_{y}_examples"
        shutil.copy(folder / "fit.svg", ROOT / "docs" / f"sweep_{name}.svg")
        lines += [*_law(load(folder), " ".join(["--y", y, *options])), ""]
    lines += ["## Ablations", "", *_table(ablations, "variant")]
    names = dict.fromkeys(row["variant"] for row in ablations)
    runs = {n: [(r["accuracy"], r["low"], r["high"]) for r in ablations if r["variant"] == n] for n in names}
    (ROOT / "docs" / "sweep_ablations.svg").write_text(figure.variants(runs, "accuracy on held-out problems"))
    (RESULTS / "sweeps.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    print("\n".join(lines))


def _run(*words: str) -> None:
    subprocess.run([sys.executable, "-m", "jaxdistill", *words], cwd=ROOT, check=True)


def _sweep(name: str, arguments: Sequence[str]) -> list[dict[str, Any]]:
    _run("sweep", f"configs/{name}.py", *arguments)
    table = ROOT / "runs" / name / "table.jsonl"
    shutil.copy(table, RESULTS / f"{name}.jsonl")
    return read_table(table)


def _commits(rows: Sequence[Mapping[str, Any]]) -> str:
    return ", ".join(sorted({commit for row in rows for commit in row["commit"].split(", ")}))


def _seconds(rows: Sequence[Mapping[str, Any]]) -> str:
    return f"{sum(row['wall_s'] for row in rows):,.0f}"


def _table(rows: Sequence[Mapping[str, Any]], axis: str) -> list[str]:
    """A line a value on the axis: accuracy of each seed and the means."""
    seeds = list(dict.fromkeys(row["seed"] for row in rows))
    heads = [axis.replace("_", " "), *(f"accuracy, seed {seed}" for seed in seeds), "mean", "held-out loss", "tokens"]
    lines = [f"| {' | '.join(heads)} |", "|---|" + "---|" * (len(heads) - 1)]
    for value in dict.fromkeys(row[axis] for row in rows):
        of_value = [row for row in rows if row[axis] == value]
        shown = [f"{r['accuracy']:.1%} [{100 * r['low']:.1f}, {100 * r['high']:.1f}]" for r in of_value]
        means = [
            sum(row[n] for row in of_value) / len(of_value) for n in ("accuracy", "heldout_loss", "average_tokens")
        ]
        name = f"{value:,}" if isinstance(value, int) else value
        lines.append(f"| {name} | {' | '.join(shown)} | {means[0]:.1%} | {means[1]:.4f} | {means[2]:.0f} |")
    return lines


def _law(found: Mapping[str, Any], options: str) -> list[str]:
    (one,) = found["laws"].values()
    shown = {name: "{value:.4g} [{low:.4g}, {high:.4g}]".format(**one[name]) for name in ("floor", "exponent")}
    p, check = one["lack_of_fit_p"], one["without_the_largest"]
    far = "; ".join("{:,.0f}: {:.4g} [{:.4g}, {:.4g}]".format(p["x"], *p["law"].values()) for p in one["predictions"])
    held = "{value:.4g} [{low:.4g}, {high:.4g}]".format(**check["predicted"])
    return [
        (
            f"`jaxdistill fit runs/sweep_data_size/table.jsonl {options}`: floor {shown['floor']}, exponent "
            f"{shown['exponent']}; lack of fit p = {p:.2g}; without the runs at {check['x']:,.0f} it predicts {held} "
            f"there, measured {check['measured']:.4g} ({'inside' if check['holds'] else 'outside'}); at {far}."
        )
    ]


if __name__ == "__main__":
    main(sys.argv[1:])
