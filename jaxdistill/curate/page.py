"""One offline HTML page about a curation: what was kept, what was dropped and why, with random examples of each."""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from jaxdistill import html
from jaxdistill.curate.rules import RULES
from jaxdistill.curate.statistics import Statistics, ordered

if TYPE_CHECKING:
    from jaxdistill.curate.run import CurateConfig

_SHOWN_BINS, _SHOWN_CHARACTERS = 24, 1500


def write(path: Path, config: "CurateConfig", counts: Mapping[str, int], statistics: Statistics) -> None:
    """Writes the page; the file appears whole or not at all."""
    found = _statements({row.place for rows in statistics.samples.values() for row in rows})
    histograms = {name: dict(list(ordered(bins).items())[:_SHOWN_BINS]) for name, bins in statistics.histograms.items()}
    html.write(
        path,
        Path(__file__).with_name("page.html.jinja"),
        config=dataclasses.asdict(config),
        counts=dict(counts),
        total=sum(counts.values()),
        histograms=histograms,
        meanings={name: (rule.__doc__ or "").strip() for name, rule in RULES.items()} | _MEANINGS,
        dropped={reason: [(row, found[row.place]) for row in rows] for reason, rows in statistics.samples.items()},
        kept=statistics.kept_samples,
        characters=_SHOWN_CHARACTERS,
    )


_MEANINGS = {
    "malformed": "The line is not a JSON object.",
    "unknown_shape": "No importer knows the row's keys.",
    "contaminated": "An evaluation set holds the problem.",
    "duplicate": "An earlier problem has the same tokens.",
    "near_duplicate": "An earlier problem says the same, found by MinHash and confirmed.",
}


def _statements(places: set[str]) -> dict[str, str]:
    """What the inputs hold at each `file:line`, as a reader wants to see it; each input is read once."""
    found: dict[str, str] = {}
    for path in sorted({place.rpartition(":")[0] for place in places}):
        with Path(path).open("rb") as lines:
            for number, line in enumerate(lines, start=1):
                if (place := f"{path}:{number}") in places:
                    found[place] = _statement(line)
    return found


def _statement(line: bytes) -> str:
    try:
        values = json.loads(line)
        names = [name for name in ("problem", "question", "prompt", "messages", "answer") if name in values]
        texts = {name: values[name] if isinstance(values[name], str) else json.dumps(values[name]) for name in names}
        return "\n\n".join(f"{name}: {text}" for name, text in texts.items()) or json.dumps(values, ensure_ascii=False)
    except (ValueError, TypeError):
        return line.decode(errors="replace")
