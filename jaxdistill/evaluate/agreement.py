"""`jaxdistill evaluate --judge-check`: how often a judge says what people said, beyond what chance would give."""

import collections
import dataclasses
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from jaxdistill import manifest, records
from jaxdistill.collect.config import RunConfig
from jaxdistill.collect.teacher import Teacher
from jaxdistill.errors import RunError, UserError
from jaxdistill.evaluate.config import EvaluateConfig
from jaxdistill.evaluate.judging import SCRIPTED, judge_all
from jaxdistill.evaluate.labelled import PEOPLE, Case, Labelled, read_labelled
from jaxdistill.evaluate.statistics import CONFIDENCE, RESAMPLES, Estimate, estimate
from jaxdistill.evaluate.tasks import select
from jaxdistill.records import Score

NOT_MEASURED = "not measured"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Kappa:
    """Cohen's kappa and its 95% interval, by a bootstrap over questions."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.2f} [{self.low:.2f}, {self.high:.2f}]"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Agreement:
    """A judge against the labels of one set, or of a part of it."""

    set: str
    part: str  # empty: the whole set
    judge: str
    prompts: tuple[str, ...]  # names and hashes
    labelled_by: str  # people, or the model that made the labels
    compared: int  # labels
    not_judged: int  # labels of texts without a verdict after one repair, or without an answer
    confusion: Mapping[str, int]  # "label -> verdict": how often
    accuracy: Estimate | None = None  # mean over questions; None where nothing was compared, or by chance (scripted)
    kappa: Kappa | None = None  # None also where there is one label and one verdict
    commonest: float | None = None  # accuracy of saying the commonest label always

    def __str__(self) -> str:
        if self.accuracy is None:
            return NOT_MEASURED
        kappa = "" if self.kappa is None else f", kappa {self.kappa}"
        unread = f", {self.not_judged} not judged" if self.not_judged else ""
        return f"{self.accuracy}{kappa} ({self.set}: {self.compared} labels by {self.labelled_by}{unread})"


def check(config: EvaluateConfig) -> list[Agreement]:
    """Has the judge judge what others labelled; writes, prints and returns its agreement with them.

    A text without a verdict after one repair is counted and not compared. Verdicts of a scripted server are counted
    too, and give no figure.

    Raises:
      UserError: a file is of no known shape, or the judge cannot be asked.
      RunError: requests are without an answer; what was compared is written.
    """
    sets = [read_labelled(path) for path in config.judge_check]
    manifest.write_config(config.workdir, config)
    found: list[Agreement] = []
    models: set[str] = set()
    cut: list[str] = []
    for labelled in sets:
        chosen = _chosen(labelled, config)
        scores = _judged(config, dataclasses.replace(labelled, cases=chosen), cut)
        models |= {str(score.judge["model"]) for score in scores.values()}
        found += _agreements(labelled, chosen, scores, config.seed)
    facts = {"judge": identity(config), "served_models": sorted(models), "scripted": bool(models & SCRIPTED)}
    if models & SCRIPTED:
        found = [dataclasses.replace(one, accuracy=None, kappa=None) for one in found]
    agreements = [dataclasses.asdict(one) for one in found]
    manifest.write_json(config.workdir / "agreement.json", {**facts, "agreements": agreements})
    counts = {"compared": sum(one.compared for one in found if not one.part)}
    manifest.write_manifest(config.workdir, "judge_check", list(config.judge_check), counts, **facts)
    _show(found, f"{', '.join(sorted(models))}, asked as {config.judge.model}")
    if cut:
        raise RunError(f"incomplete: {'; '.join(cut)}")
    return found


def _chosen(labelled: Labelled, config: EvaluateConfig) -> list[Case]:
    limit = min(config.limit or len(labelled.cases), len(labelled.cases))
    chosen = {problem.id for problem in select([c.problem for c in labelled.cases], limit, config.limit_seed)}
    return [case for case in labelled.cases if case.problem.id in chosen]


def _judged(config: EvaluateConfig, labelled: Labelled, cut: list[str]) -> dict[str, Score]:
    subjects = [subject for case in labelled.cases for item in case.items for subject in item.subjects]
    scores: dict[str, Score] = {}
    folder = config.workdir / "judge" / labelled.name
    try:
        for score in judge_all(subjects, labelled.judge, judge_run(config), folder):
            scores[score.completion_id] = score
    except (RunError, UserError) as error:
        if not scores:
            raise
        cut.append(str(error))
    return scores


def judge_run(config: EvaluateConfig) -> RunConfig:
    """What the collect client is told about the judge."""
    return RunConfig(
        workdir=config.workdir / "judge",
        teacher=config.judge,
        budget_usd=config.judge_budget_usd,
        budget_tokens=config.judge_budget_tokens,
        unknown_price=config.unknown_price,
    )


def identity(config: EvaluateConfig) -> dict[str, Any]:
    """What makes a judge the one that it is, prompts aside."""
    request = Teacher(config.judge).request(())
    return {"model": request.model, "parameters": dict(request.parameters), "base_url": config.judge.base_url}


def _agreements(labelled: Labelled, cases: Sequence[Case], scores: Mapping[str, Score], seed: int) -> list[Agreement]:
    """Of the whole set, and of each of its parts if it has several."""
    parts = sorted({case.part for case in cases})
    return [
        _agreement(labelled, part, [case for case in cases if part in ("", case.part)], scores, seed)
        for part in ("", *(parts if len(parts) > 1 else []))
    ]


def _agreement(
    labelled: Labelled, part: str, cases: Sequence[Case], scores: Mapping[str, Score], seed: int
) -> Agreement:
    clusters: list[list[tuple[str, str]]] = []  # label and verdict, by question
    for case in cases:
        judged = [item for item in case.items if all(subject.id in scores for subject in item.subjects)]
        verdicts = [labelled.verdict([scores[subject.id] for subject in item.subjects]) for item in judged]
        clusters.append([(item.label, verdict) for item, verdict in zip(judged, verdicts, strict=True)])
    pairs = [pair for cluster in clusters for pair in cluster]
    clusters = [cluster for cluster in clusters if cluster]
    labels = collections.Counter(label for label, _ in pairs)
    shares = [sum(label == verdict for label, verdict in cluster) / len(cluster) for cluster in clusters]
    return Agreement(
        set=labelled.name,
        part=part,
        judge=labelled.judge.name,
        prompts=tuple(sorted({labelled.judge.prompt_id(case.problem) for case in cases})),
        labelled_by=labelled.labelled_by,
        compared=len(pairs),
        not_judged=sum(len(case.items) for case in cases) - len(pairs),
        confusion={f"{a} -> {b}": n for (a, b), n in sorted(collections.Counter(pairs).items())},
        accuracy=estimate(shares, len(pairs), seed) if pairs else None,
        kappa=cohens_kappa(clusters, seed) if pairs else None,
        commonest=max(labels.values()) / len(pairs) if pairs else None,
    )


def cohens_kappa(clusters: Sequence[Sequence[tuple[str, str]]], seed: int = 0) -> Kappa | None:
    """Agreement beyond chance of pairs of words, (observed - expected) / (1 - expected); None where chance suffices.

    Args:
      clusters: the pairs of one question together; questions are resampled.
    """
    words = sorted({word for cluster in clusters for pair in cluster for word in pair})
    tables = np.zeros((len(clusters), len(words), len(words)))
    for table, cluster in zip(tables, clusters, strict=True):
        for first, second in cluster:
            table[words.index(first), words.index(second)] += 1
    times = np.random.default_rng(seed).multinomial(len(clusters), [1 / len(clusters)] * len(clusters), RESAMPLES)
    value = _kappa(tables.sum(0)[None])[0]
    if np.isnan(value):
        return None
    resampled = _kappa(np.einsum("rc,cij->rij", times.astype(np.float64), tables, optimize=True))
    low, high = np.nanquantile(resampled, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return Kappa(value=float(value), low=float(low), high=float(high))


def _kappa(tables: np.ndarray) -> np.ndarray:
    """Of each table of counts; nan where expected agreement is 1."""
    total = tables.sum((1, 2))
    observed = np.trace(tables, axis1=1, axis2=2) / total
    expected = (tables.sum(1) * tables.sum(2)).sum(1) / total**2
    rest = 1 - expected
    return np.divide(observed - expected, rest, out=np.full_like(rest, np.nan), where=rest > 1e-12)


def measured(config: EvaluateConfig, prompts: Iterable[str]) -> str:
    """What a judge check said of this judge with these prompts, in words; "not measured" where none did.

    Raises:
      UserError: the file is none of a judge check.
    """
    path = config.judge_agreement
    if path is None:
        return NOT_MEASURED
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
        judge, rows = stored["judge"], stored["agreements"]
        found = [records.from_dict(row, Agreement, where=str(path)) for row in rows]
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise UserError(
            f"{path}: {type(error).__name__}: {error}; expected the agreement.json of a --judge-check"
        ) from None
    now = identity(config)
    if any(judge.get(key) != now[key] for key in ("model", "parameters")):
        return f"{NOT_MEASURED} ({path} is of another judge or other settings)"
    fitting = [one for one in found if set(prompts) <= set(one.prompts) and not one.part and one.accuracy is not None]
    by_people = [one for one in fitting if one.labelled_by == PEOPLE]
    return "; ".join(map(str, by_people)) or NOT_MEASURED


def _show(found: Sequence[Agreement], judge: str) -> None:
    shown = Table(title=escape(f"agreement of {judge}"))
    for name in ("set", "labels by", "compared", "not judged", "agrees", "Cohen's kappa", "commonest label"):
        shown.add_column(name)
    for one in found:
        figures = [NOT_MEASURED] * 2 if one.accuracy is None else [str(one.accuracy), str(one.kappa or "undefined")]
        commonest = "" if one.commonest is None else f"{one.commonest:.1%}"
        name = f"{one.set} / {one.part}" if one.part else one.set
        counts = (str(one.compared), str(one.not_judged))
        shown.add_row(escape(name), one.labelled_by, *counts, *figures, commonest)
    Console(stderr=True).print(shown)
