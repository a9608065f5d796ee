"""The answers of one work to the transparency index, row by row, as tables show them."""

import dataclasses

from jaxdistill.transparency import index
from jaxdistill.transparency.index import Score, Work


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
