"""Several sets of examples as one, shuffled: the bilingual set of the paper's second model."""

import array
import contextlib
import dataclasses
import random
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path

from jaxdistill import array_records, parquet, sources
from jaxdistill.curate.text import language
from jaxdistill.errors import UserError
from jaxdistill.manifest import write_config, write_manifest
from jaxdistill.progress import say
from jaxdistill.reading import Dropped, Malformed, check_kept, not_spoken, read_rows, repeated
from jaxdistill.records import Example, whole_file


@dataclasses.dataclass(frozen=True, kw_only=True)
class MixConfig:
    """Which sets to mix."""

    examples: tuple[Path, ...]  # JSON Lines of Example
    workdir: Path  # run folder: examples.jsonl, config.json, manifest.json
    pairs: bool = False  # keep a conversation only if it is there in English and in Chinese
    seed: int = 0  # of the shuffle
    strict: bool = False  # end at the first malformed line instead of leaving it out

    def __post_init__(self) -> None:
        if not self.examples:
            raise UserError("examples is empty, expected one or more JSON Lines files")


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class _Place:
    """Where a row stands, and what is asked of it."""

    id: str
    path: Path
    start: int  # bytes before its line
    language: str
    provenance: tuple[str, ...]  # where pairs are asked for


def main(config: MixConfig) -> Mapping[str, int]:
    """Writes examples.jsonl and returns its number of rows, in all and by language, and of those without a pair.

    Memory: one row, and some 200 bytes for each; where pairs are asked for, some 500.

    Raises:
      UserError: a file is missing or empty, a line is malformed and `strict`, or two examples have one id.
      RunError: nothing was kept; all files are written.
    """
    malformed = Malformed(config.strict)
    rows = [place for path in config.examples for place in _places(path, config.pairs, malformed)]
    again = repeated(array.array("q", (hash(one.id) for one in rows)))
    names = Counter(one.id for one in rows if hash(one.id) in again) if again else Counter[str]()
    if twice := [name for name, count in names.items() if count > 1]:
        raise UserError(f"{len(twice)} ids are in the sets more than once, such as {twice[:3]}; give each its own")
    kept = _paired(rows) if config.pairs else rows
    random.Random(config.seed).shuffle(kept)
    write_config(config.workdir, config)
    with contextlib.ExitStack() as stack:
        files = {path: stack.enter_context(path.open("rb")) for path in config.examples}
        mixed = stack.enter_context(whole_file(config.workdir / "examples.jsonl"))
        for one in kept:
            files[one.path].seek(one.start)
            mixed.write(files[one.path].readline().decode().strip() + "\n")
    languages = Counter(one.language for one in kept)
    counts = {
        "kept": len(kept),
        **dict(sorted(languages.items())),
        "without_pair": len(rows) - len(kept),
    } | malformed.counts
    write_manifest(config.workdir, "mix", config.examples, counts)
    numbers = ", ".join(f"{count} {name}" for name, count in counts.items())
    say(f"mix: {numbers} in {config.workdir / 'examples.jsonl'}")
    check_kept(len(kept), {"without_pair": len(rows), **malformed.counts})
    return counts


def _places(path: Path, pairs: bool, malformed: Malformed) -> list[_Place]:
    if sources.is_remote(path) or path.suffix in (parquet.SUFFIX, *array_records.SUFFIXES):
        raise UserError(
            f"{sources.name(path)}: its rows cannot be copied as they stand; expected JSON Lines of examples on a disk"
        )
    places = [
        _Place(
            id=one.id,
            path=path,
            start=start,
            language=language(one.messages[0]["content"]),
            provenance=one.provenance if pairs else (),
        )
        for one, start in zip(read_rows(path, Example, malformed, not_spoken), _starts(path), strict=True)
        if not isinstance(one, Dropped)
    ]
    if not places:
        raise UserError(f"{path}: holds no example that can be read; expected at least one line")
    return places


def _starts(path: Path) -> Iterator[int]:
    """Bytes before each line that is not empty."""
    start = 0
    with path.open("rb") as lines:
        for line in lines:
            if line.strip():
                yield start
            start += len(line)


def _paired(rows: list[_Place]) -> list[_Place]:
    """Those of which another row is the translation: a translation names its source in its provenance."""
    by_id = {one.id: one for one in rows}
    names: set[str] = set()
    for one in rows:
        for source in one.provenance:
            other = by_id.get(source)
            if other and {one.language, other.language} == {"en", "zh"}:
                names |= {one.id, other.id}
    return [one for one in rows if one.id in names]
