"""Several sets of examples as one, shuffled: the bilingual set of the paper's second model."""

import dataclasses
import random
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

from rich.console import Console
from rich.text import Text

from jaxdistill.curate.examples import read_examples
from jaxdistill.curate.text import language
from jaxdistill.errors import UserError
from jaxdistill.manifest import write_config, write_manifest
from jaxdistill.records import Example, write_jsonl


@dataclasses.dataclass(frozen=True, kw_only=True)
class MixConfig:
    """Which sets to mix."""

    examples: tuple[Path, ...]  # JSON Lines of Example
    workdir: Path  # run folder: examples.jsonl, config.json, manifest.json
    pairs: bool = False  # keep a conversation only if it is there in English and in Chinese
    seed: int = 0  # of the shuffle

    def __post_init__(self) -> None:
        if not self.examples:
            raise UserError("examples is empty, expected one or more JSON Lines files")


def main(config: MixConfig) -> Mapping[str, int]:
    """Writes examples.jsonl and returns its number of rows, in all and by language, and of those without a pair.

    Raises:
      UserError: a file is missing, malformed or empty, or two examples have one id.
    """
    rows = [one for path in config.examples for one in read_examples(path)]
    repeated = [name for name, count in Counter(one.id for one in rows).items() if count > 1]
    if repeated:
        raise UserError(
            f"{len(repeated)} ids are in the sets more than once, such as {repeated[:3]}; give each its own"
        )
    kept = _paired(rows) if config.pairs else rows
    random.Random(config.seed).shuffle(kept)
    write_config(config.workdir, config)
    write_jsonl(config.workdir / "examples.jsonl", kept)
    languages = Counter(language(one.messages[0]["content"]) for one in kept)
    counts = {"kept": len(kept), **dict(sorted(languages.items())), "without_pair": len(rows) - len(kept)}
    write_manifest(config.workdir, "mix", config.examples, counts)
    numbers = ", ".join(f"{count} {name}" for name, count in counts.items())
    console = Console(stderr=True, highlight=False, soft_wrap=True)
    console.print(Text(f"mix: {numbers} in {config.workdir / 'examples.jsonl'}"))
    return counts


def _paired(rows: list[Example]) -> list[Example]:
    """Those of which another row is the translation: a translation names its source in its provenance."""
    by_id = {one.id: one for one in rows}
    names: set[str] = set()
    for one in rows:
        for source in one.provenance:
            other = by_id.get(source)
            if other and {language(one.messages[0]["content"]), language(other.messages[0]["content"])} == {"en", "zh"}:
                names |= {one.id, other.id}
    return [one for one in rows if one.id in names]
