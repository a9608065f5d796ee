"""Phase-1 data through the real teacher process: what is kept, and a receipt for every other rewrite."""

import dataclasses
import json
from pathlib import Path

import pytest

from jaxdistill.collect.calls import Receipt
from jaxdistill.collect.teacher import TeacherConfig
from jaxdistill.curate.reformat import ReformatConfig, main
from jaxdistill.errors import RunError, UserError
from jaxdistill.local_teacher.answers import Faults
from jaxdistill.local_teacher.problems import generate
from jaxdistill.local_teacher.server import TeacherOptions, running_teacher
from jaxdistill.records import Example, Problem, read_jsonl, write_jsonl
from jaxdistill.verify import extract_answer


def test_rewrites_are_finished_right_and_longer(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    problems = generate("all", 120, seed=0, split="train")
    bare = dataclasses.replace(problems[1], id="bare", solution=None)
    open_problem = Problem(id="open", problem="?", solution="who knows")
    write_jsonl(tmp_path / "problems.jsonl", [*problems, bare, open_problem])
    log = tmp_path / "log.jsonl"
    faults = Faults(server_error=0.05, truncated=0.1, wrong=0.1)
    with running_teacher(TeacherOptions(faults=faults, seed=3, log=log)) as base_url:
        teacher = TeacherConfig(base_url=base_url, max_tokens=400, backoff_s=0.05)
        config = ReformatConfig(problems=tmp_path / "problems.jsonl", workdir=tmp_path / "run", teacher=teacher)
        counts = main(config)
        asked = len(log.read_text().splitlines())
        assert main(config) == counts
        assert len(log.read_text().splitlines()) == asked
    assert f"reformat: {counts['kept']} kept, " in capsys.readouterr().err
    assert counts["unverifiable"] == 2
    assert counts["wrong"] > 3
    assert counts["truncated"] > 3
    assert sum(counts.values()) == 122
    by_id = {p.id: p for p in problems}
    examples = list(read_jsonl(config.workdir / "examples.jsonl", Example))
    assert len(examples) == counts["kept"]
    for example in examples:
        (source,) = example.provenance
        user, assistant = example.messages
        assert user == {"role": "user", "content": by_id[source].problem}
        assert extract_answer(assistant["content"]) == by_id[source].answer
        assert len(assistant["content"]) > len(by_id[source].solution or "")
    reasons = {r.problem_id: r.reason for r in read_jsonl(config.workdir / "dropped.jsonl", Receipt)}
    assert reasons["bare"] == reasons["open"] == "unverifiable"
    assert len(reasons) + len(examples) == 122
    assert json.loads((config.workdir / "manifest.json").read_text())["counts"] == counts


def test_rewrites_that_are_not_longer_than_the_original_are_dropped(tmp_path: Path):
    (problem,) = generate("turns", 1, seed=0, split="train")
    wordy = dataclasses.replace(problem, id="wordy", solution="a long story " * 50)
    write_jsonl(tmp_path / "problems.jsonl", [problem, wordy])
    with running_teacher() as base_url:
        teacher = TeacherConfig(base_url=base_url)
        config = ReformatConfig(problems=tmp_path / "problems.jsonl", workdir=tmp_path / "run", teacher=teacher)
        counts = main(config)
    assert (counts["kept"], counts["not_longer"]) == (1, 1)
    (receipt,) = read_jsonl(config.workdir / "dropped.jsonl", Receipt)
    assert (receipt.problem_id, receipt.reason) == ("wordy", "not_longer")
    assert receipt.detail.endswith("the original has 650")


def test_lost_requests_end_the_command_after_everything_is_written(tmp_path: Path):
    write_jsonl(tmp_path / "problems.jsonl", generate("turns", 2, seed=0, split="train"))
    teacher = TeacherConfig(base_url="http://127.0.0.1:9/v1", attempt_limit=1)
    config = ReformatConfig(problems=tmp_path / "problems.jsonl", workdir=tmp_path / "run", teacher=teacher)
    with pytest.raises(RunError, match=r"2 of 2 requests have no answer .*no connection.*run the same command again"):
        main(config)
    assert json.loads((config.workdir / "manifest.json").read_text())["counts"]["failed"] == 2
    assert len(list(read_jsonl(config.workdir / "dropped.jsonl", Receipt))) == 2


def test_prompts_are_checked(tmp_path: Path):
    teacher = TeacherConfig(base_url="http://127.0.0.1:9/v1")
    write_jsonl(tmp_path / "problems.jsonl", generate("turns", 1, seed=0, split="train"))
    config = ReformatConfig(problems=tmp_path / "problems.jsonl", workdir=tmp_path / "run", teacher=teacher, prompt="x")
    with pytest.raises(UserError, match=r"one of .*reformat"):
        main(config)
    with pytest.raises(UserError, match="verify_timeout_s"):
        dataclasses.replace(config, verify_timeout_s=0.0)
