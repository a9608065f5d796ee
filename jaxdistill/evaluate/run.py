"""`jaxdistill evaluate`: samples a task's problems from models, grades and compares them, and says how sure it is."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from jaxdistill import manifest, records
from jaxdistill.checkpoint import base_of
from jaxdistill.errors import RunError, UserError
from jaxdistill.evaluate import page
from jaxdistill.evaluate.asking import ask, spent_usd
from jaxdistill.evaluate.compare import Comparison, compare_all
from jaxdistill.evaluate.config import EvaluateConfig
from jaxdistill.evaluate.grade import Summary, grade, summarize
from jaxdistill.evaluate.plan import Plan, Wanted, plans, problems_of
from jaxdistill.evaluate.results import Result, measures
from jaxdistill.evaluate.sampling import sample
from jaxdistill.progress import say
from jaxdistill.records import Completion
from jaxdistill.verify import Verifier


def main(config: EvaluateConfig) -> Mapping[str, Summary]:
    """Samples what is missing, grades everything, prints and writes it; returns the summaries by name.

    Completions are committed one by one: a run that was killed goes on where it stopped. A request that an endpoint
    did not answer is never scored: the summary is of the problems whose samples are all here, and tells the coverage.

    Raises:
      RunError: some of it is incomplete; all that is here is written.
      UserError: models, task, problems or settings do not fit together, or earlier completions are of something else.
    """
    task, problems = problems_of(config)
    rankings = _rankings(config.rankings)
    planned = plans(config, task, problems)
    earlier = [plan.earlier() for plan in planned]  # all are looked at before any is sampled
    manifest.write_config(config.workdir, config)
    cut: list[str] = []  # why something is incomplete
    with Verifier() as verifier:
        parts = [_evaluate(plan, done, verifier, rankings, cut) for plan, done in zip(planned, earlier, strict=True)]
    results = [result for result in parts if result is not None]
    if not results:
        raise RunError(f"no problem has all its samples: {'; '.join(cut)}")
    comparisons = compare_all(results) if len(results) > 1 else []
    _write(config, results, comparisons)
    _show(config, results, comparisons)
    if cut:
        raise RunError(f"incomplete: {'; '.join(cut)}")
    return {result.name: result.summary for result in results}


def _evaluate(
    plan: Plan,
    done: dict[str, Completion],
    verifier: Verifier,
    rankings: Mapping[str, float] | None,
    cut: list[str],
) -> Result | None:
    """One model, from its first missing sample to its summary; None while no problem has all its samples.

    Args:
      cut: takes why not all of it is here.
    """
    wanted = plan.wanted()
    _complete(plan, done, cut)
    completions = [done[id_] for id_ in wanted if id_ in done]
    scores = grade(completions, {p.id: p.answer or "" for p in plan.problems}, verifier, plan.task.grader)
    records.write_jsonl(plan.folder / "scores.jsonl", scores)
    lacking = {problem.id for id_, (problem, _) in wanted.items() if id_ not in done}
    scores = [score for one, score in zip(completions, scores, strict=True) if one.item_id not in lacking]
    coverage, completions = len(completions) / len(wanted), [c for c in completions if c.item_id not in lacking]
    if lacking:
        cut.append(f"{plan.name} has {coverage:.1%} of its {len(wanted)} completions")
    if not completions:
        return None
    if rankings is not None and (missing := sorted({c.id for c in completions} - rankings.keys())):
        raise UserError(
            f"{plan.config.rankings} has no score for {len(missing)} of {len(completions)} completions, such as "
            f"{missing[:3]}; expected one line for each"
        )
    coverage *= plan.share
    summary = summarize(completions, scores, verifier, rankings=rankings, coverage=coverage)
    manifest.write_json(plan.folder / "summary.json", dataclasses.asdict(summary))
    if plan.folder != plan.config.workdir:
        manifest.write_config(plan.folder, plan.config_alone())
    _write_manifest(plan, {"problems": len(plan.problems), "completions": len(done)})
    return Result(plan=plan, completions=completions, scores=scores, summary=summary)


def _write_manifest(plan: Plan, counts: Mapping[str, int]) -> None:
    about = {n: getattr(plan.task, n) for n in ("prompt", "grader", "metric", "licence", "why", "source")}
    facts: dict[str, Any] = {"model": plan.weights, "task": {"name": plan.task.name, **about}}
    inputs = [plan.config.path, *(folder / "completions.jsonl" for folder in plan.merged())]
    if plan.model is None:
        facts["cost_usd"] = sum(spent_usd(folder) for folder in (plan.folder, *plan.merged()))
    else:
        inputs.append(base_of(plan.model) / "config.json")
    manifest.write_manifest(plan.folder, "evaluate", inputs, counts, **facts)


def _complete(plan: Plan, done: dict[str, Completion], cut: list[str]) -> None:
    """Adds what is missing to the completions of earlier calls, each of them committed as it comes."""
    left = {id_: item for id_, item in plan.wanted().items() if id_ not in done}
    if not left:
        return
    plan.folder.mkdir(parents=True, exist_ok=True)
    try:
        with (plan.folder / "completions.jsonl").open("a", encoding="utf-8") as lines:
            for completion in _sample(plan, left):
                lines.write(records.to_json(completion) + "\n")
                lines.flush()
                done[completion.id] = completion
    except (RunError, UserError) as error:
        if plan.model is not None or not done:
            raise
        cut.append(str(error))


def _sample(plan: Plan, left: Wanted) -> Iterator[Completion]:
    return ask(plan, left) if plan.model is None else sample(plan, left)


def _rankings(path: Path | None) -> dict[str, float] | None:
    if path is None:
        return None
    rankings: dict[str, float] = {}
    for number, row in records.read_json_objects(path):
        id_, score = row.get("id"), row.get("score")
        if not isinstance(id_, str) or isinstance(score, bool) or not isinstance(score, int | float):
            raise UserError(f'{path}:{number}: expected {{"id": id of a completion, "score": number}}')
        rankings[id_] = float(score)
    return rankings


def _write(config: EvaluateConfig, results: Sequence[Result], comparisons: Sequence[Comparison]) -> None:
    """What is about all models together."""
    if len(results) > 1:
        summaries = {result.name: dataclasses.asdict(result.summary) for result in results}
        together = {
            "models": summaries,
            "comparisons": [dataclasses.asdict(comparison) for comparison in comparisons],
            "curve": [dataclasses.asdict(point) for point in page.curve_of(results)],
        }
        manifest.write_json(config.workdir / "summary.json", together)
        inputs = [result.plan.folder / "scores.jsonl" for result in results]
        counts = {"models": len(results), "completions": sum(len(result.completions) for result in results)}
        manifest.write_manifest(config.workdir, "compare", inputs, counts)
    page.write(config.workdir / "evaluation.html", results, comparisons)


def _show(config: EvaluateConfig, results: Sequence[Result], comparisons: Sequence[Comparison]) -> None:
    """The table, and what the comparisons say."""
    accuracy = results[0].summary.accuracy
    about = f"{accuracy.n_problems} problems x {accuracy.n_samples // accuracy.n_problems} samples"
    shown = Table(title=escape(f"{config.task}, {about}"))
    shown.add_column("measure")
    for result in results:
        shown.add_column(escape(result.name), justify="right")
    for name, values in measures({result.name: result.summary for result in results}).items():
        shown.add_row(escape(name), *map(escape, values))
    Console(stderr=True).print(shown)
    for comparison in comparisons:
        say(comparison.verdict)
    if config.part()[1] > 1:
        say(f"this is shard {config.shard}: evaluate with --merge and the workdirs of all shards for the whole")
    say(f"all outputs: {config.workdir / 'evaluation.html'}")
