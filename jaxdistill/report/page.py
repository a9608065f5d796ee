"""One self-contained HTML page about a run of the chain: what it collected, trained, measured and wrote."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path

from markupsafe import Markup

from jaxdistill import html, thinking
from jaxdistill.evaluate import scaling
from jaxdistill.evaluate.grade import Summary
from jaxdistill.evaluate.statistics import CONFIDENCE, RESAMPLES
from jaxdistill.lineage import Lineage
from jaxdistill.report import graph, plots
from jaxdistill.report.answers import Entry

KEPT = "verified"  # the count in Page.collected that is no drop
_FOLD_CHARACTERS = 600  # longer parts of an output are folded


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stage:
    """One model of the chain, evaluated."""

    name: str
    summary: Summary


@dataclasses.dataclass(frozen=True, kw_only=True)
class Comparison:
    """One problem and what the stages answered."""

    question: str
    gold: str
    outputs: Mapping[str, tuple[str, bool]]  # by stage: the text, and whether it is correct


@dataclasses.dataclass(frozen=True, kw_only=True)
class Page:
    """All that the page shows; mappings are shown in their order."""

    title: str
    facts: Mapping[str, str]  # commit, seed, wall time, versions
    collected: Mapping[str, int]  # answers of the teacher by what became of them
    stages: tuple[Stage, ...]  # first to last
    losses: Mapping[str, plots.Curve]  # by phase; steps count from the start of the phase
    heldout: Mapping[str, plots.Curve]
    comparisons: tuple[Comparison, ...]
    lineage: Lineage | None = None  # what the numbers stand on
    transparency: Entry | None = None
    lede: bool = True  # one sentence from the first stage to the last, where they are one model's on one task

    def __post_init__(self):
        names = [stage.name for stage in self.stages]
        if (not names and self.lineage is None) or len(set(names)) < len(names):
            raise ValueError(f"stages are {names}; expected one or more, each with a name of its own")
        unknown = {name for comparison in self.comparisons for name in comparison.outputs} - set(names)
        if unknown:
            raise ValueError(f"comparisons name stages {sorted(unknown)}; expected some of {names}")


def write(path: Path, page: Page) -> None:
    """Writes the page; the file appears whole or not at all."""
    summaries = {stage.name: stage.summary for stage in page.stages}
    points = [point for name, summary in summaries.items() for point in scaling.points(name, summary)]
    html.write(
        path,
        Path(__file__).with_name("page.html.jinja"),
        page=page,
        kept=KEPT,
        confidence=CONFIDENCE,
        resamples=RESAMPLES,
        parts=_parts,
        fold_characters=_FOLD_CHARACTERS,
        loss_plot=Markup(plots.losses(page.losses, page.heldout, [*summaries])),
        scaling_plot=Markup(scaling.plot(points) if points else ""),
        pipeline=Markup(graph.pipeline(page.lineage) if page.lineage else ""),
    )


def _parts(text: str) -> dict[str, str]:
    """The reasoning and the answer: those that have text."""
    reasoning, answer = thinking.split(text)
    return {name: part for name, part in (("reasoning", reasoning), ("answer", answer)) if part}
