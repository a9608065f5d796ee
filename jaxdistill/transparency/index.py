"""The 25 indicators, one YAML file a work, and the points that follow from its answers or its published subtotals."""

import dataclasses
import functools
import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, get_args

import yaml

from jaxdistill import sources
from jaxdistill.errors import UserError
from jaxdistill.records import from_dict

Dimension = Literal["data", "methodology", "evaluation", "open_source"]
DIMENSIONS: tuple[Dimension, ...] = get_args(Dimension)
Verdict = Literal["disclosed", "unused", "undisclosed", "open"]  # no word that YAML reads as a boolean
EARNS: frozenset[Verdict] = frozenset({"disclosed", "unused"})

_FOLDER = Path(__file__).parent
WORKS = _FOLDER / "works"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Indicator:
    """One yes/no question; a yes earns its points in full."""

    id: str
    dimension: Dimension
    points: int
    question: str
    may_be_unused: bool = False  # saying that a work has none of it earns the points as well


@dataclasses.dataclass(frozen=True, kw_only=True)
class Answer:
    """What a work discloses about one indicator."""

    verdict: Verdict
    evidence: tuple[str, ...] = ()  # links, or paths with what they show; required where the points are earned
    reason: str = ""  # why not, or why not yet; required where they are not earned


@dataclasses.dataclass(frozen=True, kw_only=True)
class Subtotals:
    """Points by dimension."""

    data: int
    methodology: int
    evaluation: int
    open_source: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Published:
    """A score that someone published without the answers behind it."""

    source: str
    points: Subtotals
    total: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Work:
    """A work with its answers, all of them, or with published subtotals and those answers that are known."""

    name: str
    note: str = ""
    published: Published | None = None
    answers: Mapping[str, Answer] = dataclasses.field(default_factory=dict)  # by indicator id


@dataclasses.dataclass(frozen=True, order=True)
class Points:
    """Points that are certain, and points that are possible; the same number where nothing is open."""

    low: int
    high: int

    def __str__(self) -> str:
        return f"{self.low}" if self.low == self.high else f"{self.low} to {self.high}"

    def __add__(self, other: "Points") -> "Points":
        return Points(self.low + other.low, self.high + other.high)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Score:
    """The points of a work, and which indicators earn theirs: True, False, or None where that is not known."""

    by_dimension: Mapping[Dimension, Points]
    earned: Mapping[str, bool | None]

    @property
    def total(self) -> Points:
        """Points of 100."""
        return sum(self.by_dimension.values(), start=Points(0, 0))


@functools.cache
def indicators() -> dict[str, Indicator]:
    """The index: indicators by id, in the order of the paper."""
    path = _FOLDER / "indicators.yaml"
    rows = [from_dict(values, Indicator, f"{path}: entry {i}") for i, values in enumerate(_read(path), start=1)]
    return {row.id: row for row in rows}


def load(path: Path) -> Work:
    """Reads the file of a work and checks it.

    Raises:
      UserError: it is not YAML of a Work's fields; answers are missing, unknown or lack their evidence or reason; or
        its points do not add up.
    """
    values = _read(path)
    if not isinstance(values, dict):
        raise UserError(f"{path}: found a {type(values).__name__}, expected the fields of a work: name, answers, ...")
    work = from_dict(values, Work, f"{path}")
    mistakes = _mistakes(work)
    if mistakes:
        raise UserError(f"{path}: " + "; ".join(mistakes))
    score(work, f"{path}")
    return work


def _mistakes(work: Work) -> list[str]:
    """Everything that is wrong with the answers and the published total of a work."""
    known, mistakes = indicators(), []
    if unknown := sorted(work.answers.keys() - known.keys()):
        mistakes.append(f"no indicator is named {', '.join(unknown)}; expected some of {', '.join(known)}")
    missing = [name for name in known if name not in work.answers]
    if missing and work.published is None:
        mistakes.append(f"no answer to {', '.join(missing)}; give each a verdict, `open` with a reason if unknown")
    for name in work.answers.keys() & known.keys():
        answer = work.answers[name]
        if answer.verdict in EARNS and not any(link.strip() for link in answer.evidence):
            mistakes.append(f"{name} is {answer.verdict} without evidence; give at least one link or path")
        if answer.verdict not in EARNS and not answer.reason.strip():
            mistakes.append(f"{name} is {answer.verdict} without a reason; say what was looked for, or who can tell")
        if answer.verdict == "unused" and not known[name].may_be_unused:
            allowed = ", ".join(i.id for i in known.values() if i.may_be_unused)
            mistakes.append(f"{name} is unused; only {allowed} can be")
    if work.published is not None:
        subtotals = dataclasses.asdict(work.published.points)
        if sum(subtotals.values()) != work.published.total:
            mistakes.append(f"published total is {work.published.total}, but {subtotals} add up to another number")
    return mistakes


def score(work: Work, where: str = "") -> Score:
    """The points of a work.

    Of a work of which only subtotals are published, an indicator is earned, or is not, where that is so in every set
    of indicators with those points. A dimension has at most 8 indicators, so all sets are tried.

    Args:
      where: starts an error message.

    Raises:
      UserError: no set of indicators has the published points and agrees with the answers.
    """
    by_dimension: dict[Dimension, Points] = {}
    earned: dict[str, bool | None] = {}
    for dimension in DIMENSIONS:
        asked = [indicator for indicator in indicators().values() if indicator.dimension == dimension]
        choices = [_choices(work.answers.get(indicator.id)) for indicator in asked]
        ways = {way: _points(asked, way) for way in itertools.product(*choices)}
        if work.published is not None:
            wanted = getattr(work.published.points, dimension)
            ways = {way: points for way, points in ways.items() if points == wanted}
            if not ways:
                raise UserError(
                    f"{where or work.name}: {dimension} was published with {wanted} points, which no choice of its "
                    "indicators gives that agrees with the answers"
                )
        by_dimension[dimension] = Points(min(ways.values()), max(ways.values()))
        for indicator, found in zip(asked, zip(*ways, strict=True), strict=True):
            earned[indicator.id] = found[0] if len(set(found)) == 1 else None
    return Score(by_dimension=by_dimension, earned=earned)


def _choices(answer: Answer | None) -> tuple[bool, ...]:
    """Whether an indicator may be earned, and whether it may not."""
    if answer is None or answer.verdict == "open":
        return (False, True)
    return (answer.verdict in EARNS,)


def _points(asked: list[Indicator], earned: tuple[bool, ...]) -> int:
    return sum(indicator.points for indicator, yes in zip(asked, earned, strict=True) if yes)


def dump(work: Work) -> str:
    """The file of a work, as `load` reads it; empty fields are left out."""
    values = dataclasses.asdict(work)
    values["answers"] = {name: {k: v for k, v in answer.items() if v} for name, answer in values["answers"].items()}
    plain = _plain({name: value for name, value in values.items() if value})
    return yaml.safe_dump(plain, sort_keys=False, allow_unicode=True, width=118)


def _plain(value: Any) -> Any:
    """Tuples as lists, which YAML has."""
    if isinstance(value, dict):
        return {key: _plain(inner) for key, inner in value.items()}
    return [_plain(inner) for inner in value] if isinstance(value, tuple | list) else value


class _Loader(yaml.SafeLoader):
    """Refuses a key that stands twice: YAML's readers would keep the last one without a word."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for i, key in enumerate(keys):
            if key in keys[:i]:
                problem = f"the key {key!r} stands twice"
                raise yaml.constructor.ConstructorError(None, None, problem, node.value[i][0].start_mark)
        return super().construct_mapping(node, deep)


def _read(path: Path) -> Any:
    sources.check(path, "a YAML file of a work, as in jaxdistill/transparency/works")
    try:
        return yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not valid YAML: {' '.join(str(error).split())}; mend it") from None
