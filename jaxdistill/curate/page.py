"""One offline HTML page about a curation: what was kept, what was dropped and why, with random examples of each."""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import jinja2

from jaxdistill.curate.rules import RULES
from jaxdistill.curate.statistics import Statistics, ordered

if TYPE_CHECKING:
    from jaxdistill.curate.run import CurateConfig

_SHOWN_BINS, _SHOWN_CHARACTERS = 24, 1500


def write(path: Path, config: "CurateConfig", counts: Mapping[str, int], statistics: Statistics) -> None:
    """Writes the page; the file appears whole or not at all."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    histograms = {name: dict(list(ordered(bins).items())[:_SHOWN_BINS]) for name, bins in statistics.histograms.items()}
    rendered = environment.get_template("page.html.jinja").render(
        config=dataclasses.asdict(config),
        counts=dict(counts),
        total=sum(counts.values()),
        histograms=histograms,
        meanings={name: (rule.__doc__ or "").strip() for name, rule in RULES.items()} | _MEANINGS,
        dropped={reason: [(row, _statement(row.place)) for row in rows] for reason, rows in statistics.samples.items()},
        kept=statistics.kept_samples,
        characters=_SHOWN_CHARACTERS,
    )
    partial = path.with_name(path.name + ".partial")
    partial.write_text(rendered, encoding="utf-8", errors="xmlcharrefreplace")  # half an emoji becomes a reference
    partial.replace(path)


_MEANINGS = {
    "malformed": "The line is not a JSON object.",
    "unknown_shape": "No importer knows the row's keys.",
    "contaminated": "An evaluation set holds the problem.",
    "duplicate": "An earlier problem has the same tokens.",
    "near_duplicate": "An earlier problem says the same, found by MinHash and confirmed.",
}


def _statement(place: str) -> str:
    """What the input holds at `file:line`, as a reader wants to see it."""
    path, _, number = place.rpartition(":")
    with Path(path).open("rb") as lines:
        line = next((line for i, line in enumerate(lines, start=1) if i == int(number)), b"")
    try:
        values = json.loads(line)
        parts = {
            name: values[name] for name in ("problem", "question", "prompt", "messages", "answer") if name in values
        }
        text = "\n\n".join(
            f"{name}: {value if isinstance(value, str) else json.dumps(value)}" for name, value in parts.items()
        )
        return text or json.dumps(values, ensure_ascii=False)
    except (ValueError, TypeError):
        return line.decode(errors="replace")
