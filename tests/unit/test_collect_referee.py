"""A judge model decides what no rule can compare, through a ledger and a budget of its own, and is read strictly."""

import dataclasses
import json
from pathlib import Path

import pytest
from rows import log_entries
from test_collect_failures import config_for

from jaxdistill.collect import referee
from jaxdistill.collect.calls import Receipt
from jaxdistill.collect.run import CollectConfig, main
from jaxdistill.errors import RunError, UserError
from jaxdistill.local_teacher.answers import Faults
from jaxdistill.local_teacher.app import TeacherOptions
from jaxdistill.local_teacher.problems import generate
from jaxdistill.local_teacher.server import running_teacher
from jaxdistill.records import Chain, read_jsonl, write_jsonl


def undecidable(folder: Path, base_url: str, count: int) -> CollectConfig:
    """Problems whose gold answers are words, each its own, which cannot be parsed."""
    config = config_for(folder, base_url)
    problems = generate("all", count, seed=3, split="train")
    write_jsonl(config.problems, [dataclasses.replace(p, answer=f"（见 {p.id}）") for p in problems])
    return config


@pytest.mark.parametrize(
    ("said", "label"),
    [
        ("They are equal.\nVerdict: same", "same"),
        ("**Verdict: Different**", "different"),
        ("Verdict: same\nVerdict: different\n", "different"),
        ("Verdict: same\nOr is it?", None),
        ("The verdict: same", None),
        ("Verdict: same or different", None),
        ("same", None),
    ],
)
def test_a_word_is_read_strictly(said: str, label: str | None):
    found = referee._WORD.search(said.strip())
    assert (found and found[1].lower()) == label


def test_a_judge_decides_what_no_rule_can(tmp_path: Path):
    log, judge_log = tmp_path / "log.jsonl", tmp_path / "judge.jsonl"
    with (
        running_teacher(TeacherOptions(log=log)) as base_url,
        running_teacher(TeacherOptions(log=judge_log, faults=Faults(wrong=0.2, server_error=0.1))) as judging,
    ):
        config = undecidable(tmp_path, base_url, 30)
        with pytest.raises(RunError, match=r"nothing was kept .* 30 unverifiable"):
            main(config)
        asked = dataclasses.replace(config.teacher, base_url=judging)
        judged = dataclasses.replace(config, judge=asked, judge_budget_tokens=100_000)
        counts = main(judged)
        assert counts["verified"] > 5
        assert counts["wrong"] > 5
        assert counts["unverifiable"] > 0  # its word could not be read
        assert sum(counts.values()) == 30
        answers = len(log_entries(judge_log))
        assert main(judged) == counts  # asked once
        assert len(log_entries(judge_log)) == answers
        assert len(log_entries(log)) == 30  # and the teacher for nothing more
    chains = list(read_jsonl(config.workdir / "chains.jsonl", Chain))
    assert len(chains) == counts["verified"]
    for chain in chains:
        assert chain.verdict.label == "correct"
        assert chain.verdict.rule.startswith("judge/local-teacher/same_answer.v1@")
        assert chain.verdict.extracted
    receipts = list(read_jsonl(config.workdir / "dropped.jsonl", Receipt))
    assert all("rule judge/" in r.detail for r in receipts if r.reason == "wrong")
    assert all("the judge: no verdict: 'It depends.'" in r.detail for r in receipts if r.reason == "unverifiable")
    facts = json.loads((config.workdir / "manifest.json").read_text())["judge"]
    assert facts["asked"] == 30
    assert facts["decided"] == counts["verified"] + counts["wrong"]
    assert facts["spent_usd"] > 0


def test_its_budget_is_hard_and_what_is_left_is_asked_by_the_next_run(tmp_path: Path):
    with running_teacher() as base_url:
        config = undecidable(tmp_path, base_url, 20)
        judged = dataclasses.replace(config, judge=config.teacher, judge_budget_tokens=3500)
        with pytest.raises(RunError, match=r"the judge: over budget; run the same command again"):
            main(judged)
        facts = json.loads((config.workdir / "manifest.json").read_text())["judge"]
        assert 0 < facts["decided"] < 20
        assert facts["spent_tokens"] <= 3500
        counts = main(dataclasses.replace(judged, judge_budget_tokens=None))
        assert counts["verified"] + counts["wrong"] == 20


def test_what_a_rule_decided_is_no_judge_s(tmp_path: Path):
    judge = tmp_path / "run" / "judge"
    with running_teacher() as base_url:
        config = config_for(tmp_path, base_url)
        assert main(dataclasses.replace(config, judge=config.teacher))["verified"] == 12
    assert not judge.exists()
    with pytest.raises(UserError, match="judge of method debate cannot be set"):
        dataclasses.replace(config, judge=config.teacher, method="debate")
    stranger = dataclasses.replace(config.teacher, base_url="https://example.invalid/v1", api_key_env="NO_SUCH_KEY")
    with pytest.raises(UserError, match="NO_SUCH_KEY"):
        main(dataclasses.replace(config, judge=stranger))
