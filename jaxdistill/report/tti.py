"""`jaxdistill tti score`, `tti run` and `tti leaderboard`: the transparency index as tables, HTML and a plot."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path

from markupsafe import Markup
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from jaxdistill import html, lineage
from jaxdistill.errors import UserError
from jaxdistill.records import whole_file
from jaxdistill.report import plots
from jaxdistill.report.answers import Entry
from jaxdistill.transparency import index
from jaxdistill.transparency import run as own
from jaxdistill.transparency.index import DIMENSIONS, Score


@dataclasses.dataclass(frozen=True, kw_only=True)
class ScoreConfig:
    """A work to be scored."""

    file: Path  # YAML of one work, as in jaxdistill/transparency/works


@dataclasses.dataclass(frozen=True, kw_only=True)
class LeaderboardConfig:
    """The paper's seven works and any others, best first."""

    works: tuple[Path, ...] = ()  # YAML files of more works
    html: Path | None = None  # page to write, with the plot and every answer


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Run folders that answer the index themselves, as far as they can."""

    runs: tuple[Path, ...]  # folders of stages, or folders that hold some
    output: Path | None = None  # YAML to write, for a person to answer what is open
    name: str = ""  # of the work; by default the first folder's


def score(config: ScoreConfig) -> Score:
    """Prints the answers and the points of a work.

    Raises:
      UserError: as `jaxdistill.transparency.index.load`.
    """
    work = index.load(config.file)
    entry = Entry(work=work, score=index.score(work))
    show(entry)
    return entry.score


def run(config: RunConfig) -> Entry:
    """Prints what run folders prove of themselves, and writes it as the file of a work.

    Raises:
      UserError: as `jaxdistill.lineage.trace`, or the output is there already.
    """
    if not config.runs:
        raise UserError("no run folder was given; expected one or more: jaxdistill tti run RUN...")
    if config.output is not None and config.output.exists():
        raise UserError(f"{config.output} is there already, perhaps with a person's answers; name another file")
    found = own.work(lineage.trace(config.runs), config.name or config.runs[0].resolve().name)
    entry = Entry(work=found, score=index.score(found))
    show(entry)
    if config.output is not None:
        with whole_file(config.output) as file:
            file.write(index.dump(found))
        Console().print(f"{config.output}: answer what is open, then jaxdistill tti score it", soft_wrap=True)
    return entry


def show(entry: Entry) -> None:
    """Prints one work."""
    table = Table(title=escape(entry.work.name))
    for column in ("indicator", "points", "answer", "evidence or reason"):
        table.add_column(column, justify="right" if column == "points" else "left", overflow="fold")
    for row in entry.rows:
        table.add_row(row.id, f"{row.points}", row.state, escape(row.why))
    console = Console()
    console.print(table)
    parts = ", ".join(f"{name.replace('_', ' ')} {entry.score.by_dimension[name]}" for name in DIMENSIONS)
    console.print(f"{parts}; total {entry.score.total} of 100", highlight=False, soft_wrap=True)


def leaderboard(config: LeaderboardConfig) -> list[Entry]:
    """Prints the leaderboard and writes its page; returns it, best first.

    Raises:
      UserError: a file is not that of a work, or two works have one name.
    """
    works = [index.load(path) for path in (*sorted(index.WORKS.glob("*.yaml")), *config.works)]
    names = [work.name for work in works]
    if repeated := sorted({name for name in names if names.count(name) > 1}):
        raise UserError(f"two works are named {', '.join(repeated)}; give each file a name of its own")
    entries = [Entry(work=work, score=index.score(work)) for work in works]
    entries.sort(key=lambda entry: (entry.score.total, entry.work.name), reverse=True)
    table = Table(title="technical transparency index, points of 100")
    for column in ("work", *(name.replace("_", " ") for name in DIMENSIONS), "total"):
        table.add_column(column, justify="left" if column == "work" else "right")
    for entry in entries:
        points = [str(entry.score.by_dimension[name]) for name in DIMENSIONS]
        table.add_row(escape(entry.work.name), *points, str(entry.score.total))
    console = Console()
    console.print(table)
    if config.html is not None:
        write_leaderboard(config.html, entries)
        console.print(f"page: {config.html}", soft_wrap=True)
    return entries


def write_leaderboard(path: Path, entries: Sequence[Entry]) -> None:
    """Writes the leaderboard as one HTML page that needs no network."""
    scores: Mapping[str, Score] = {entry.work.name: entry.score for entry in entries}
    template, plot = Path(__file__).with_name("leaderboard.html.jinja"), Markup(plots.transparency(scores))
    html.write(path, template, entries=entries, dimensions=DIMENSIONS, most=_most(), plot=plot)


def _most() -> dict[str, int]:
    """The most points a dimension can have."""
    found = index.indicators().values()
    return {name: sum(i.points for i in found if i.dimension == name) for name in DIMENSIONS}
