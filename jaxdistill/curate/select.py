"""The examples that reflect most: markers and backtracking per 1,000 tokens of what the assistant says."""

import array
import dataclasses
import heapq
from collections.abc import Iterator, Mapping
from pathlib import Path

from jaxdistill.curate.reflection import reflect
from jaxdistill.errors import UserError
from jaxdistill.manifest import write_config, write_manifest
from jaxdistill.progress import say
from jaxdistill.reading import Dropped, Malformed, check_kept, not_spoken, read_rows
from jaxdistill.records import Example, to_json, whole_file


@dataclasses.dataclass(frozen=True, kw_only=True)
class SelectConfig:
    """How many examples to choose, and by what."""

    examples: Path  # JSON Lines of Example
    workdir: Path  # run folder: examples.jsonl, scores.jsonl, config.json, manifest.json
    count: int = 5000  # examples to choose; the paper chose about 5,000
    backtrack_weight: float = 5.0  # markers that one changed result is worth
    least_tokens: int = 100  # shorter chains are left out: one "wait" in ten words is no reflection
    strict: bool = False  # end at the first malformed line instead of leaving it out

    def __post_init__(self) -> None:
        if self.count < 1:
            raise UserError(f"count is {self.count}, expected at least 1")
        for name in ("backtrack_weight", "least_tokens"):
            if not getattr(self, name) >= 0:
                raise UserError(f"{name} is {getattr(self, name)}, expected 0 or more")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scored:
    """The score of one example, and whether it was chosen."""

    id: str
    score: float  # (markers + weight * backtracks) per 1,000 tokens
    tokens: int
    markers: int
    backtracks: int
    chosen: bool


def main(config: SelectConfig) -> Mapping[str, int]:
    """Writes the chosen examples in their order and the scores of all; returns how many were chosen and not.

    Ties are broken by the order of the input. Memory: one example, and 33 bytes for each.

    Raises:
      UserError: the examples are missing or none, or a line is malformed and `strict`.
      RunError: nothing was kept; all files are written.
    """
    malformed = Malformed(config.strict)
    scores, found = array.array("d"), {name: array.array("q") for name in ("tokens", "markers", "backtracks")}
    for one in _examples(config, malformed):
        reflection = reflect("\n".join(m["content"] for m in one.messages if m["role"] == "assistant"))
        scores.append(reflection.score(config.backtrack_weight))
        for name, values in found.items():
            values.append(getattr(reflection, name))
    if not scores:
        raise UserError(f"{config.examples}: holds no example that can be read; expected at least one line")
    able = ((scores[i], -i) for i, tokens in enumerate(found["tokens"]) if tokens >= config.least_tokens)
    chosen = bytearray(len(scores))
    for _, number in heapq.nlargest(config.count, able):
        chosen[-number] = 1
    write_config(config.workdir, config)
    with whole_file(config.workdir / "examples.jsonl") as kept, whole_file(config.workdir / "scores.jsonl") as all_of:
        for i, one in enumerate(_examples(config, Malformed(told=0))):
            values = {name: values[i] for name, values in found.items()}
            row = Scored(id=one.id, score=scores[i], chosen=bool(chosen[i]), **values)
            all_of.write(to_json(row) + "\n")
            if row.chosen:
                kept.write(to_json(one) + "\n")
    short, count = sum(tokens < config.least_tokens for tokens in found["tokens"]), sum(chosen)
    counts = {"kept": count, "less_reflective": len(scores) - count - short, "too_short": short}
    counts |= malformed.counts
    least = min((score for score, is_chosen in zip(scores, chosen, strict=True) if is_chosen), default=0.0)
    write_manifest(config.workdir, "select", [config.examples], counts, least_score=least)
    say(f"select: {count} of {len(scores)} examples, scores from {least:.1f} per 1,000 tokens")
    check_kept(count, {name: count for name, count in counts.items() if name != "kept"})
    return counts


def _examples(config: SelectConfig, malformed: Malformed) -> Iterator[Example]:
    rows = read_rows(config.examples, Example, malformed, not_spoken)
    return (row for row in rows if not isinstance(row, Dropped))
