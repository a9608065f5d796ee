"""evaluation.html: the table, and every output beside the other models' on the same problem, in a page to search."""

import base64
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup

from jaxdistill import html, thinking
from jaxdistill.evaluate import scaling
from jaxdistill.evaluate.compare import Comparison
from jaxdistill.evaluate.grade import repeats
from jaxdistill.evaluate.results import Result, measures
from jaxdistill.evaluate.statistics import CONFIDENCE, RESAMPLES
from jaxdistill.records import Completion, Score

_MOST_CHARACTERS = 64_000_000  # of outputs on the page; a browser searches no more within a blink


def write(path: Path, results: Sequence[Result], comparisons: Sequence[Comparison]) -> None:
    """Writes the page; it appears whole or not at all.

    Outputs are held as JSON and drawn when they are opened, so the page opens fast however long they are.
    """
    rows, left = _rows(results)
    data = {"models": [result.name for result in results], "rows": rows}
    script = Path(__file__).with_name("page.js").read_text(encoding="utf-8")
    plan, curve = results[0].plan, curve_of(results)
    references = scaling.references(plan.task.name)
    sampling = [f"{name} {value}" for name, value in vars(plan.config.sampling).items()]
    html.write(
        path,
        Path(__file__).with_name("page.html.jinja"),
        title=f"{plan.task.name}: {', '.join(result.name for result in results)}",
        facts=[*(f"{r.name}: {r.plan.weights}" for r in results), f"seed {plan.config.seed}", *sampling],
        names=[result.name for result in results],
        measures=measures({result.name: result.summary for result in results}),
        comparisons=comparisons,
        curve=curve,
        curve_plot=Markup(scaling.plot(curve, references)),
        references=references,
        confidence=CONFIDENCE,
        resamples=RESAMPLES,
        rows=len(rows),
        left=left,
        data=Markup(json.dumps(data, ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c")),
        script=Markup(script),
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
    )


def curve_of(results: Sequence[Result]) -> list[scaling.Point]:
    """Accuracy against tokens, of every model and budget."""
    return [
        point
        for result in results
        for point in scaling.points(result.plan.source, result.summary, result.plan.budget.name or scaling.ONE)
    ]


def _rows(results: Sequence[Result]) -> tuple[list[dict[str, Any]], int]:
    """A row for each problem and sample, first samples first where not all fit; and how many do not."""
    given = [{c.id: (c, s) for c, s in zip(r.completions, r.scores, strict=True)} for r in results]
    problems = {problem.id: problem for problem in results[0].plan.problems}
    order = {id_: place for place, id_ in enumerate(problems)}
    ids = {c.id: (c.sample_index, order[c.item_id], c) for r in results for c in r.completions}
    rows: list[dict[str, Any]] = []
    characters = 0
    in_turn = sorted(ids.values(), key=lambda found: found[:2])
    for index, _, one in in_turn:
        outputs = [own.get(one.id) for own in given]
        characters += sum(len(output[0].text) for output in outputs if output)
        if rows and characters > _MOST_CHARACTERS:
            break
        problem = problems[one.item_id]
        row = {"id": problem.id, "sample": index, "question": problem.problem, "gold": problem.answer or ""}
        rows.append({**row, "outputs": [_output(*output) if output else None for output in outputs]})
    return rows, len(ids) - len(rows)


def _output(completion: Completion, score: Score) -> dict[str, Any]:
    reasoning, answer = thinking.split(completion.text)
    notes = ["truncated"] if completion.finish_reason == "length" else []
    return {
        "verdict": score.verdict.label,
        "rule": score.verdict.rule.replace("_", " "),
        "extracted": score.verdict.extracted,
        "thinking": completion.thinking_tokens,
        "tokens": completion.answer_tokens,
        "said": score.judge.get("said", ""),
        "notes": notes + (["ends in a loop"] if repeats(completion.text) else []),
        "reasoning": reasoning,
        "answer": answer,
    }
