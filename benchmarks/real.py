"""The chain on real weights and real data: SmolLM2-135M-Instruct, real long-thought chains, GSM8K and MATH-500.

    make real        (or: .venv/bin/python benchmarks/real.py)

Needs ../shared/data beside the checkout. Resumes where it was stopped. Writes benchmarks/results/real.{json,md}.
"""

import dataclasses
import hashlib
import importlib.util
import json
import os
import platform
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import smollm2

from jaxdistill import export, manifest, metrics, records, runtime
from jaxdistill.curate.examples import example
from jaxdistill.data import loader
from jaxdistill.errors import RunError, UserError
from jaxdistill.evaluate import run as evaluate
from jaxdistill.evaluate.grade import Summary
from jaxdistill.evaluate.results import read_completions
from jaxdistill.evaluate.statistics import PairedTest, mcnemar
from jaxdistill.evaluate.tasks import BOXED_PROMPT
from jaxdistill.records import Example, Problem
from jaxdistill.sample.request import SamplingConfig
from jaxdistill.train import run as train
from jaxdistill.verify import Verifier

ROOT = Path(__file__).parents[1]
DATA = ROOT.parent / "shared" / "data"
SETS = ("r1_distill_qwen32b_limo", "journey_aime_exp5")
TASKS = {"gsm8k": (DATA / "gsm8k/test.jsonl", 100), "math500": (DATA / "math500/math500.jsonl", 50)}
HELDOUT_SHARE = 20  # one problem of 20 is held out
LEAST_TRAINED_TOKENS = 400_000
SAMPLING = SamplingConfig(temperature=0.6, top_k=50, top_p=0.95, max_new_tokens=2048)


def chains(verifier: Verifier, counts: dict[str, int], dropped: list[dict[str, str]]) -> Iterator[Example]:
    """The chains whose boxed answer is right, as they are: none is cut. The others leave a receipt in `dropped`."""
    for name in SETS:
        for _, row in records.read_json_objects(DATA / "long_thought" / f"{name}.jsonl"):
            verdict = verifier.verify(row["response"], row["answer"])
            label = f"{name}: {verdict.label}"
            counts[label] = counts.get(label, 0) + 1
            if verdict.label == "correct":
                asked = BOXED_PROMPT.replace("{problem}", row["problem"])
                yield example(Problem(id=row["id"], problem=asked), row["response"], suffix="chain")
            else:
                dropped.append({"id": row["id"], "reason": f"{verdict.label}: {verdict.rule}"})


def is_held_out(row: Example) -> bool:
    """By the problem's words: both sets hold chains of some problems, and one must not teach what the other tests."""
    question = " ".join(row.messages[0]["content"].split())
    return int(hashlib.sha256(question.encode()).hexdigest(), 16) % HELDOUT_SHARE == 0


def prepare(run: Path) -> dict[str, int]:
    """Writes the examples to train on and those held out; returns what was kept and dropped."""
    done = run / "prepared.json"
    if not done.is_file():
        counts: dict[str, int] = {}
        with Verifier() as verifier:
            dropped: list[dict[str, str]] = []
            rows = list(chains(verifier, counts, dropped))
        loader.write_receipts(run / "dropped.jsonl", dropped)
        held = [is_held_out(row) for row in rows]
        counts["train"] = records.write_jsonl(
            run / "examples.jsonl", (r for r, h in zip(rows, held, strict=True) if not h)
        )
        counts["held out"] = records.write_jsonl(
            run / "heldout.jsonl", (r for r, h in zip(rows, held, strict=True) if h)
        )
        manifest.write_json(done, counts)
    return json.loads(done.read_text())


def score(run: Path, stage: str, model: Path) -> dict[str, Summary]:
    """Both benchmarks for one model."""
    return {
        task: summary
        for task, (path, limit) in TASKS.items()
        for summary in evaluate.main(
            evaluate.EvaluateConfig(
                workdir=run / "evaluate" / stage / task,
                model=(model,),
                task=task,
                path=path,
                limit=limit,
                sampling=SAMPLING,
                slots=50,
                compute_dtype="float32",
            )
        ).values()
    }


def main() -> None:
    """Runs what is left of the chain and writes the table."""
    if not DATA.is_dir():
        raise UserError(f"{DATA} is not there; expected the evaluation and seed data beside the checkout")
    runtime.start()
    spec = importlib.util.spec_from_file_location("recipe", ROOT / "configs" / "smollm2_long_thought.py")
    assert spec is not None
    assert spec.loader is not None
    recipe = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(recipe)
    config = recipe.config()
    run = config.workdir.parent
    base = smollm2.folder(config.model)
    counts = prepare(run)
    history = manifest.History(run)
    phases = train.main(config)
    trained = config.workdir / config.phases[0].name
    tokens = sum(row.get("loss_tokens", 0) for row in metrics.read(trained))
    if tokens < LEAST_TRAINED_TOKENS:  # before the hours of evaluation
        raise RunError(f"{tokens:.0f} tokens trained, expected {LEAST_TRAINED_TOKENS}: give the recipe more steps")
    history.keep()
    before = score(run, "before", base)
    history.keep()
    after = score(run, "after", trained)
    error = export.main(export.ExportConfig(workdir=run / "export", model=trained))
    assert error is not None, "it is verified"
    history.keep()
    pairs = {task: paired(run, task) for task in TASKS}
    write(counts, phases, metrics.read(trained), before, after, pairs, error, history)


def paired(run: Path, task: str) -> PairedTest:
    """Exact McNemar test of the same problems before and after."""
    right = []
    for stage in ("before", "after"):
        rows = read_completions(run / "evaluate" / stage / task)
        right.append([score.verdict.label == "correct" for _, score in sorted(rows, key=lambda row: row[0].id)])
    return mcnemar(*right)


def write(
    counts: dict[str, int],
    phases: dict[str, Any],
    rows: list[dict[str, float]],
    before: dict[str, Summary],
    after: dict[str, Summary],
    pairs: dict[str, PairedTest],
    error: float,
    history: manifest.History,
) -> None:
    """The measured table, for people and for programs."""
    [phase] = phases.values()
    steps = [row for row in rows if "loss_tokens" in row]
    heldout = [row["heldout_loss"] for row in rows if "heldout_loss" in row]
    rate = sorted(row["tokens_per_s"] for row in steps)[len(steps) // 2]
    facts = {
        "commit": ", ".join(history.commits),
        "command": "make real",
        "device": f"{jax.device_count()} x {jax.devices()[0].device_kind}, {os.cpu_count()} {platform.machine()} cores",
        "chains": counts,
        "dropped as longer than a row of 8192": phase["dropped"],
        "trained tokens": int(sum(row["loss_tokens"] for row in steps)),
        "held-out loss before and after, nats/token": [round(heldout[0], 4), round(heldout[-1], 4)],
        "median tokens/s": round(rate, 1),
        "median MFU": round(sorted(row["mfu"] for row in steps)[len(steps) // 2], 3),
        "export logit error": error,
        "wall_s": round(history.wall_s),
        "sampling": dataclasses.asdict(SAMPLING),
    }
    results = {
        "before": {k: dataclasses.asdict(v) for k, v in before.items()},
        "after": {k: dataclasses.asdict(v) for k, v in after.items()},
    }
    manifest.write_json(ROOT / "benchmarks/results/real.json", {**facts, **results})
    lines = ["# SmolLM2-135M-Instruct on real long-thought chains", "", "| fact | value |", "|---|---|"]
    lines += [f"| {name} | {value} |" for name, value in facts.items()]
    lines += [
        "",
        metrics.MFU_FORMULA + ".",
        "",
        "| task | model | avg@1 [95% interval] | average tokens | truncated | no answer |",
        "|---|---|---|---|---|---|",
    ]
    for task in TASKS:
        for stage, found in (("before", before), ("after", after)):
            s = found[task]
            rates = f"{s.truncation_rate:.0%} | {s.no_answer_rate:.0%}"
            lines.append(f"| {task} | {stage} | {s.accuracy} | {s.tokens.average:.0f} | {rates} |")
    for task, test in pairs.items():
        lines += ["", f"{task}: {test.first_only} problems only before, {test.second_only} only after; McNemar p = "]
        lines[-1] += f"{test.p_value:.3f}."
    (ROOT / "benchmarks/results/real.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    print("\n".join(lines))


if __name__ == "__main__":
    try:
        main()
    except (UserError, RunError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2 if isinstance(error, UserError) else 1) from None
