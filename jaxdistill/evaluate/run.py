"""`jaxdistill evaluate`: samples a task's problems from models, grades and compares them, and says how sure it is."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from jaxdistill import manifest, records, thinking
from jaxdistill.checkpoint import base_of
from jaxdistill.collect.config import ready
from jaxdistill.errors import RunError, UserError
from jaxdistill.evaluate import agreement, inspect_log, page
from jaxdistill.evaluate.asking import CALLS, ask, spent_usd
from jaxdistill.evaluate.compare import Comparison, compare_all
from jaxdistill.evaluate.config import EvaluateConfig
from jaxdistill.evaluate.grade import Summary, golds, grade, summarize, unanswered
from jaxdistill.evaluate.judging import Subject, judge_all
from jaxdistill.evaluate.plan import Plan, Wanted, plans, problems_of
from jaxdistill.evaluate.results import Result, measures
from jaxdistill.evaluate.sampling import sample
from jaxdistill.progress import say
from jaxdistill.records import Completion, Score
from jaxdistill.verify import Verifier


def main(config: EvaluateConfig) -> Mapping[str, Summary]:
    """Samples what is missing, grades everything, prints and writes it; returns the summaries by name.

    Completions are committed one by one: a run that was killed goes on where it stopped. A request that an endpoint
    did not answer is never scored: the summary is of the problems whose samples are all here, and tells the coverage.

    Raises:
      RunError: some of it is incomplete; all that is here is written.
      UserError: models, task, problems or settings do not fit together, or earlier completions are of something else.
    """
    if config.judge_check:
        agreement.check(config)
        return {}
    task, problems = problems_of(config)
    if task.judge:
        ready(agreement.judge_run(config))  # refused before hours of sampling, not after
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
    if plan.task.judge:
        scores = _judge(plan, completions, cut)
    else:
        scores = grade(completions, golds(plan.problems), verifier, plan.task.grader)
    records.write_jsonl(plan.folder / "scores.jsonl", scores)
    scored = {score.completion_id for score in scores}
    lacking = {problem.id for id_, (problem, _) in wanted.items() if id_ not in scored}
    coverage = len(scored) / len(wanted)
    if lacking:
        of = "completions, judged" if plan.task.judge else "completions"
        cut.append(f"{plan.name} has {coverage:.1%} of its {len(wanted)} {of}")
    completions = [one for one in completions if one.item_id not in lacking]
    kept = {one.id for one in completions}
    scores = [score for score in scores if score.completion_id in kept]
    if not completions:
        return None
    if rankings is not None and (missing := sorted({c.id for c in completions} - rankings.keys())):
        raise UserError(
            f"{plan.config.rankings} has no score for {len(missing)} of {len(completions)} completions, such as "
            f"{missing[:3]}; expected one line for each"
        )
    coverage *= plan.share
    groups = {problem.id: problem.meta["group"] for problem in plan.problems if "group" in problem.meta}
    summary = summarize(
        completions,
        scores,
        None if plan.task.judge else verifier,
        rankings=rankings,
        coverage=coverage,
        groups=groups,
        agreement=agreement.measured(plan.config, _prompts(plan)) if plan.task.judge else "",
    )
    manifest.write_json(plan.folder / "summary.json", dataclasses.asdict(summary))
    if plan.folder != plan.config.workdir:
        manifest.write_config(plan.folder, plan.config_alone())
    _write_manifest(plan, {"problems": len(plan.problems), "completions": len(done)})
    return Result(plan=plan, completions=completions, scores=scores, summary=summary)


def _judge(plan: Plan, completions: Sequence[Completion], cut: list[str]) -> list[Score]:
    """Scores of a judge, in order; what it did not judge has none. It is not asked about what holds no answer.

    Args:
      cut: takes why not all is judged.
    """
    judge = plan.task.judge
    assert judge is not None
    problems = {problem.id: problem for problem in plan.problems}
    found: dict[str, Score] = {}
    subjects: list[Subject] = []
    for one in completions:
        answer = thinking.split(one.text)[1]
        if verdict := unanswered(one, answer):
            found[one.id] = Score(completion_id=one.id, verdict=verdict, grader=judge.name, points=0.0)
        else:
            subjects.append(Subject(id=one.id, problem=problems[one.item_id], response=answer))
    files = [folder / "scores.jsonl" for folder in plan.merged()]
    known = {s.judge["request_key"]: s for path in files for s in records.read_jsonl(path, Score) if s.judge}
    run = agreement.judge_run(plan.config)
    try:
        for score in judge_all(subjects, judge, run, run.workdir / plan.name, known):
            found[score.completion_id] = score
    except (RunError, UserError) as error:
        cut.append(str(error))
    return [found[one.id] for one in completions if one.id in found]


def _prompts(plan: Plan) -> set[str]:
    """What the judge is asked with, by names and hashes."""
    judge = plan.task.judge
    return {judge.prompt_id(problem) for problem in plan.problems} if judge else set()


def _write_manifest(plan: Plan, counts: Mapping[str, int]) -> None:
    about = {n: getattr(plan.task, n) for n in ("prompt", "grader", "metric", "licence", "why", "source")}
    facts: dict[str, Any] = {"model": plan.weights, "task": {"name": plan.task.name, **about}}
    inputs = [plan.config.problems_file, *(folder / "completions.jsonl" for folder in plan.merged())]
    if plan.task.judge:
        run = agreement.judge_run(plan.config)
        facts["judge"] = {
            **agreement.identity(plan.config),
            "prompts": sorted(_prompts(plan)),
            "cost_usd_of_all_models": spent_usd(run.workdir),
        }
    if plan.model is None:
        facts["cost_usd"] = sum(spent_usd(folder / CALLS) for folder in (plan.folder, *plan.merged()))
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
    """What is about all models together, and each model's log for inspect_ai."""
    if config.inspect_log:
        for result in results:
            records.write_jsonl(result.plan.folder / "inspect.json", [inspect_log.document(result)])
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
