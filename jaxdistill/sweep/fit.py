"""`jaxdistill fit TABLE`: saturating power laws through the runs of a sweep, how sure they are, and where they lead."""

import csv
import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import scipy.stats
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from jaxdistill import manifest, records, sources
from jaxdistill.errors import UserError
from jaxdistill.progress import say
from jaxdistill.sweep import figure, law
from jaxdistill.sweep.law import CONFIDENCE, SIZES, Interval

_DOUBTFUL = 0.05  # p below which chance is not believed in


@dataclasses.dataclass(frozen=True, kw_only=True)
class FitConfig:
    """A table, and what of it a law is fitted to: y = floor + scale * x**-exponent."""

    table: Path  # JSON Lines or CSV, a run a line, as `jaxdistill sweep` writes them
    x: str = "examples"  # column that grows
    y: str = "error"  # column that falls, such as error or heldout_loss; of accuracy, 1 - accuracy is fitted
    by: str = ""  # column; its values have a law each
    extrapolate: tuple[float, ...] = ()  # x to predict; by default 2 and 10 times the largest
    relative: bool = (
        False  # noise is a share of y, as of losses over a wide range; by default it is the same everywhere
    )
    resamples: int = 2000  # of the bootstrap
    seed: int = 0  # of the bootstrap
    output: Path | None = None  # folder to write; by default one beside the table, named after y and x

    def __post_init__(self) -> None:
        if self.resamples < 100 or any(not x > 0 for x in self.extrapolate):
            raise UserError(
                f"resamples is {self.resamples} and extrapolate {self.extrapolate}; expected 100 or more, and x above 0"
            )

    @property
    def workdir(self) -> Path:
        """Where fit.json and fit.svg are written."""
        return self.output or self.table.parent / f"fit_{self.y}_{self.x}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Prediction:
    """What is said of a point beyond the runs."""

    x: float
    law: Interval  # the mean of many runs, if the law goes on
    run: Interval  # a single run


@dataclasses.dataclass(frozen=True, kw_only=True)
class Check:
    """The law of the runs without those of the largest x, held against these."""

    x: float
    runs: int
    predicted: Interval  # their mean
    measured: float

    @property
    def holds(self) -> bool:
        """Whether what was measured is inside."""
        return self.predicted.low <= self.measured <= self.predicted.high


@dataclasses.dataclass(frozen=True, kw_only=True)
class Result:
    """One law."""

    name: str
    fit: law.Fit
    predictions: tuple[Prediction, ...]
    check: Check | None  # None where too few sizes are left without the largest

    def to_json(self) -> dict[str, Any]:
        """What fit.json holds of it."""
        parameters = {name: dataclasses.asdict(getattr(self.fit, name)) for name in ("floor", "scale", "exponent")}
        check = dataclasses.asdict(self.check) | {"holds": self.check.holds} if self.check else None
        return {
            "runs": len(self.fit.x),
            **parameters,
            "lack_of_fit_p": self.fit.lack_of_fit,
            "predictions": [dataclasses.asdict(one) for one in self.predictions],
            "without_the_largest": check,
        }


def main(config: FitConfig) -> list[Result]:
    """Fits, prints, and writes fit.json and fit.svg.

    Raises:
      UserError: the table lacks a column, or has too few runs or sizes for a law.
    """
    groups = _groups(config)
    largest = max(max(xs) for xs, _ in groups.values())
    beyond = np.array(config.extrapolate or (2 * largest, 10 * largest))
    results = [_result(config, beyond, name, *map(np.array, points)) for name, points in groups.items()]
    y = _y_name(config)
    laws = {result.name: result.to_json() for result in results}
    form = f"{y} = floor + scale * {config.x}**-exponent"
    values = {"law": form, "confidence": CONFIDENCE, "resamples": config.resamples, "laws": laws}
    manifest.write_json(config.workdir / "fit.json", values)
    drawn = figure.scaling_law(results, config.x, y)
    with records.whole_file(config.workdir / "fit.svg") as file:
        file.write(drawn)
    manifest.write_config(config.workdir, config)
    runs = sum(len(result.fit.x) for result in results)
    manifest.write_manifest(config.workdir, "fit", [config.table], {"runs": runs, "laws": len(results)})
    _show(form, config, results)
    return results


def _y_name(config: FitConfig) -> str:
    return "1 - accuracy" if config.y == "accuracy" else config.y


def read_table(path: Path) -> list[dict[str, Any]]:
    """The rows of a table; numbers in CSV are numbers, empty fields None.

    Raises:
      UserError: there is no such file, or it holds no row.
    """
    if path.suffix != ".csv":
        rows = [row for _, row in records.read_json_objects(path)]
    else:
        sources.check(path, "a table, as `jaxdistill sweep` writes it")
        with path.open(encoding="utf-8", newline="") as file:
            rows = [{name: _value(text) for name, text in row.items()} for row in csv.DictReader(file)]
    if not rows:
        raise UserError(f"{path}: holds no run; expected one a line")
    return rows


def _value(text: str) -> Any:
    try:
        return float(text)
    except ValueError:
        return text or None


def _groups(config: FitConfig) -> Mapping[str, tuple[list[float], list[float]]]:
    """x and y of the runs of each law, in the order of the table."""
    rows = read_table(config.table)
    for column in filter(None, (config.x, config.y, config.by)):
        if all(column not in row for row in rows):
            known = dict.fromkeys(name for row in rows for name in row)
            raise UserError(f"{config.table} has no column {column!r}; it has {', '.join(known)}")
    groups: dict[str, tuple[list[float], list[float]]] = {}
    left_out = 0
    for row in rows:
        x, y = row.get(config.x), row.get(config.y)
        if not isinstance(x, int | float) or not isinstance(y, int | float):
            left_out += 1
            continue
        xs, ys = groups.setdefault(str(row.get(config.by, "runs")), ([], []))
        xs.append(float(x))
        ys.append(1 - y if config.y == "accuracy" else float(y))
    if left_out:
        say(f"{left_out} of {len(rows)} runs have no number for {config.x} and {config.y}: left out")
    if not groups:
        raise UserError(f"{config.table}: no run has numbers for {config.x} and {config.y}")
    return groups


def _result(config: FitConfig, beyond: np.ndarray, name: str, x: np.ndarray, y: np.ndarray) -> Result:
    where = f"{config.table}{f', {config.by} {name}' if config.by else ''}"
    try:
        found = law.fit(x, y, config.relative, config.resamples, config.seed)
    except UserError as error:
        raise UserError(f"{where}: {error}") from None
    if np.ptp(y) and scipy.stats.linregress(np.log(x), y, alternative="greater").pvalue < _DOUBTFUL:  # type: ignore[attr-defined]
        raise UserError(f"{where}: {config.y} grows with {config.x}, and the law falls; fit what falls, such as error")
    predictions = tuple(
        Prediction(x=at, law=said, run=found.new_runs(at, 1, config.seed))
        for at, said in zip(beyond.tolist(), found.curve(beyond), strict=True)
    )
    return Result(name=name, fit=found, predictions=predictions, check=_check(config, x, y))


def _check(config: FitConfig, x: np.ndarray, y: np.ndarray) -> Check | None:
    largest = x == x.max()
    if len(np.unique(x[~largest])) < SIZES:
        return None
    shorter = law.fit(x[~largest], y[~largest], config.relative, config.resamples, config.seed)
    at, count = float(x.max()), int(largest.sum())
    predicted = shorter.new_runs(at, count, config.seed)
    return Check(x=at, runs=count, predicted=predicted, measured=float(y[largest].mean()))


def _show(form: str, config: FitConfig, results: Sequence[Result]) -> None:
    """The table, and what is to be doubted."""
    shown = Table(title=escape(f"{form}, [95% interval]"))
    for column in (config.by or "law", "runs", "floor", "exponent", *(f"at {p.x:g}" for p in results[0].predictions)):
        shown.add_column(escape(column), justify="left" if column == (config.by or "law") else "right")
    for result in results:
        said = (result.fit.floor, result.fit.exponent, *(one.law for one in result.predictions))
        shown.add_row(escape(result.name), str(len(result.fit.x)), *(escape(str(one)) for one in said))
    Console().print(shown)
    for result in results:
        p, check = result.fit.lack_of_fit, result.check
        if p is not None and p < _DOUBTFUL:
            say(
                f"{result.name}: these runs follow no such law: their means are farther from it than their scatter "
                f"allows (p = {p:.2g}); do not extrapolate from it"
            )
        if p is None:
            say(
                f"{result.name}: no {config.x} was run twice, so that nothing says whether the law fits; run more seeds"
            )
        if check is not None:
            found = "as measured" if check.holds else "which is not what was measured; do not extrapolate from it"
            say(
                f"{result.name}: without the runs at {check.x:g}, it predicts {check.predicted} there, measured "
                f"{check.measured:.4g}: {found}"
            )
    say(f"intervals hold if the law goes on beyond the runs, which no run here shows; {config.workdir / 'fit.svg'}")


def load(folder: Path) -> dict[str, Any]:
    """fit.json of a folder."""
    return json.loads((folder / "fit.json").read_text(encoding="utf-8"))
