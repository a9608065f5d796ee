"""Evaluating what an API serves: what failed is never scored, budgets hold, and nothing is asked twice."""

import dataclasses
import json
from pathlib import Path

import pytest

from jaxdistill.collect.teacher import TeacherConfig
from jaxdistill.errors import RunError, UserError
from jaxdistill.evaluate import run as evaluate
from jaxdistill.evaluate.config import EvaluateConfig
from jaxdistill.evaluate.results import read_completions
from jaxdistill.local_teacher.answers import Faults
from jaxdistill.local_teacher.problems import generate
from jaxdistill.local_teacher.server import TeacherOptions, running_teacher
from jaxdistill.records import write_jsonl


def config_for(folder: Path, base_url: str, **changes: object) -> EvaluateConfig:
    write_jsonl(folder / "problems.jsonl", generate("all", 20, seed=0, split="train"))
    endpoint = TeacherConfig(base_url=base_url, max_tokens=2000, attempt_limit=1, temperature=0.6)
    config = EvaluateConfig(
        workdir=folder / "run", endpoint=endpoint, task="problems", path=folder / "problems.jsonl", samples=2
    )
    return dataclasses.replace(config, **changes)  # type: ignore[arg-type]


def test_failed_requests_are_not_scored_and_are_asked_again(tmp_path: Path):
    log = tmp_path / "log.jsonl"
    with running_teacher(
        TeacherOptions(faults=Faults(server_error=0.2, truncated=0.2, wrong=0.2), log=log)
    ) as base_url:
        config = config_for(tmp_path, base_url)
        with pytest.raises(
            RunError, match=r"^incomplete: .* have no answer yet.*; local-teacher has \d+\.\d% of its 40 completions$"
        ):
            evaluate.main(config)
        summary = json.loads((config.workdir / "summary.json").read_text())
        scored = read_completions(config.workdir)
        assert summary["coverage"] == len(scored) / 40 < 1
        assert summary["accuracy"]["n_samples"] < len(scored)  # of the problems that have both samples
        patient = dataclasses.replace(config.endpoint, attempt_limit=12, backoff_s=0.02)
        config = dataclasses.replace(config, endpoint=patient, inspect_log=True)
        [final] = evaluate.main(config).values()
        answered = [json.loads(line)["outcome"] for line in log.read_text().splitlines()]
        asked = len(answered)
        assert evaluate.main(config)["local-teacher"] == final  # from what is there
        assert len(log.read_text().splitlines()) == asked
    assert final.coverage == 1
    assert final.accuracy.n_samples == 40
    assert final.truncation_rate == answered.count("truncated") / 40 > 0
    assert final.accuracy.value == answered.count("right") / 40
    assert final.thinking_tokens.average > final.answer_tokens.average > 0
    written = json.loads((config.workdir / "manifest.json").read_text())
    assert written["model"] == f"local-teacher at {base_url}"
    assert written["cost_usd"] == 0
    log_of_all = json.loads((config.workdir / "inspect.json").read_text())
    assert log_of_all["status"] == "success"
    values = [sample["scores"]["boxed_math"]["value"] for sample in log_of_all["samples"]]
    assert sum(values) / 40 == final.accuracy.value


def test_a_budget_ends_it_and_more_goes_on(tmp_path: Path):
    with running_teacher(TeacherOptions()) as base_url:
        config = config_for(tmp_path, base_url, budget_tokens=5_000)
        with pytest.raises(RunError, match="the budget leaves no room"):
            evaluate.main(config)
        part = len(read_completions(config.workdir))
        assert 0 < part < 40
        [summary] = evaluate.main(dataclasses.replace(config, budget_tokens=10_000_000)).values()
    assert summary.accuracy.n_samples == 40


def test_other_settings_are_refused(tmp_path: Path):
    with running_teacher(TeacherOptions()) as base_url:
        config = config_for(tmp_path, base_url, limit=2, samples=1)
        evaluate.main(config)
        changed = dataclasses.replace(config, endpoint=dataclasses.replace(config.endpoint, temperature=1.0))
        with pytest.raises(UserError, match="changes to: settings"):
            evaluate.main(changed)


def test_what_cannot_be_asked_is_refused(tmp_path: Path):
    with pytest.raises(UserError, match="nothing to evaluate"):
        EvaluateConfig(workdir=tmp_path, task="problems", path=tmp_path)
    with pytest.raises(UserError, match="an evaluation asks once"):
        config_for(tmp_path, "http://127.0.0.1:9/v1", endpoint=TeacherConfig(max_tokens=5, larger_max_tokens=10))
