"""`jaxdistill evaluate`: samples a task's problems from models, grades and compares them, and says how sure it is."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from jaxdistill import manifest, records
from jaxdistill.checkpoint import base_of
from jaxdistill.errors import UserError
from jaxdistill.evaluate import page, tasks
from jaxdistill.evaluate.compare import Comparison, compare_all
from jaxdistill.evaluate.config import EvaluateConfig
from jaxdistill.evaluate.grade import Summary, grade, grader_named, summarize
from jaxdistill.evaluate.plan import Plan, Wanted, plans
from jaxdistill.evaluate.results import Result, measures
from jaxdistill.evaluate.sampling import sample
from jaxdistill.progress import say
from jaxdistill.records import Completion
from jaxdistill.verify import Verifier


def main(config: EvaluateConfig) -> Mapping[str, Summary]:
    """Samples what is missing, grades everything, prints and writes it; returns the summaries by name.

    Completions are committed one by one: a run that was killed goes on where it stopped.

    Raises:
      UserError: models, task, problems or settings do not fit together, or earlier completions are of something else.
    """
    task = tasks.task(config.task)
    if config.prompt is not None:
        task = dataclasses.replace(task, prompt=config.prompt)
    grader_named(task.grader)  # refused before hours of sampling, not after
    problems = tasks.select(task.problems_from(config.path), config.limit, config.limit_seed)
    rankings = _rankings(config.rankings)
    planned = plans(config, task, problems)
    earlier = [plan.earlier() for plan in planned]  # all are looked at before any is sampled
    manifest.write_config(config.workdir, config)
    with Verifier() as verifier:
        results = [_evaluate(plan, done, verifier, rankings) for plan, done in zip(planned, earlier, strict=True)]
    comparisons = compare_all(results) if len(results) > 1 else []
    _write(config, results, comparisons)
    _show(config, results, comparisons)
    return {result.name: result.summary for result in results}


def _evaluate(
    plan: Plan, done: dict[str, Completion], verifier: Verifier, rankings: Mapping[str, float] | None
) -> Result:
    """One model, from its first missing sample to its summary."""
    completions = _complete(plan, done)
    scores = grade(completions, {p.id: p.answer or "" for p in plan.problems}, verifier, plan.task.grader)
    if rankings is not None and (missing := sorted({c.id for c in completions} - rankings.keys())):
        raise UserError(
            f"{plan.config.rankings} has no score for {len(missing)} of {len(completions)} completions, such as "
            f"{missing[:3]}; expected one line for each"
        )
    summary = summarize(completions, scores, verifier, rankings=rankings)
    records.write_jsonl(plan.folder / "scores.jsonl", scores)
    manifest.write_json(plan.folder / "summary.json", dataclasses.asdict(summary))
    if plan.folder != plan.config.workdir:
        manifest.write_config(plan.folder, dataclasses.replace(plan.config, model=(plan.model,)))
    counts = {"problems": len(plan.problems), "completions": len(completions)}
    inputs = [plan.config.path, base_of(plan.model) / "config.json"]
    about = {n: getattr(plan.task, n) for n in ("prompt", "grader", "metric", "licence", "why", "source")}
    facts = {"model": plan.weights, "task": {"name": plan.task.name, **about}}
    manifest.write_manifest(plan.folder, "evaluate", inputs, counts, **facts)
    return Result(plan=plan, completions=completions, scores=scores, summary=summary)


def _complete(plan: Plan, done: dict[str, Completion]) -> list[Completion]:
    """All completions, of earlier calls and of this one, in the order of the problems."""
    wanted = plan.wanted()
    left = {id_: item for id_, item in wanted.items() if id_ not in done}
    if left:
        plan.folder.mkdir(parents=True, exist_ok=True)
        with (plan.folder / "completions.jsonl").open("a", encoding="utf-8") as lines:
            for completion in _sample(plan, left):
                lines.write(records.to_json(completion) + "\n")
                lines.flush()
                done[completion.id] = completion
    return [done[id_] for id_ in wanted]


def _sample(plan: Plan, left: Wanted) -> Iterator[Completion]:
    return sample(plan, left)


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
        together = {"models": summaries, "comparisons": [dataclasses.asdict(c) for c in comparisons]}
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
    say(f"all outputs: {config.workdir / 'evaluation.html'}")
