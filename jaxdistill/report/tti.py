"""`jaxdistill tti score FILE` and `jaxdistill tti leaderboard`: the transparency index as tables, HTML and a plot."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path

from markupsafe import Markup
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from jaxdistill.errors import UserError
from jaxdistill.report import page, plots
from jaxdistill.transparency import index
from jaxdistill.transparency.index import DIMENSIONS, Score, Work


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
class Row:
    """One indicator of one work, as it is shown."""

    dimension: str
    id: str
    question: str
    points: int
    state: str
    why: str  # evidence or reason


@dataclasses.dataclass(frozen=True, kw_only=True)
class Entry:
    """One work of a leaderboard."""

    work: Work
    score: Score

    @property
    def rows(self) -> list[Row]:
        """All 25 indicators."""
        return [
            Row(
                dimension=i.dimension.replace("_", " "),
                id=i.id,
                question=i.question,
                points=i.points,
                state=_state(self, i.id),
                why=_why(self.work, i.id),
            )
            for i in index.indicators().values()
        ]


def _state(entry: Entry, indicator: str) -> str:
    """The verdict, or what follows from published subtotals."""
    if answer := entry.work.answers.get(indicator):
        return answer.verdict
    follows = {True: "earned, as its subtotal says", False: "not earned, as its subtotal says", None: "not known"}
    return follows[entry.score.earned[indicator]]


def _why(work: Work, indicator: str) -> str:
    answer = work.answers.get(indicator)
    return "; ".join(filter(None, (*answer.evidence, answer.reason))) if answer else ""


def score(config: ScoreConfig) -> Score:
    """Prints the answers and the points of a work.

    Raises:
      UserError: as `jaxdistill.transparency.index.load`.
    """
    work = index.load(config.file)
    entry = Entry(work=work, score=index.score(work))
    show(entry)
    return entry.score


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
        page.write_text(config.html, leaderboard_page(entries))
        console.print(f"page: {config.html}", soft_wrap=True)
    return entries


def leaderboard_page(entries: Sequence[Entry]) -> str:
    """The leaderboard as one HTML page that needs no network."""
    scores: Mapping[str, Score] = {entry.work.name: entry.score for entry in entries}
    return (
        page.environment()
        .get_template("leaderboard.html.jinja")
        .render(
            entries=entries,
            dimensions=DIMENSIONS,
            most=_most(),
            plot=Markup(plots.transparency(scores)),
        )
    )


def _most() -> dict[str, int]:
    """The most points a dimension can have."""
    found = index.indicators().values()
    return {name: sum(i.points for i in found if i.dimension == name) for name in DIMENSIONS}
