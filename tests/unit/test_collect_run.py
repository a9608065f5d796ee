"""The collect command against the real teacher process: receipts, retries, restarts, kills, keys, bad input."""

import collections
import dataclasses
import hashlib
import json
import os
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from rows import log_entries

from jaxdistill.collect.calls import Receipt
from jaxdistill.collect.run import CollectConfig, main
from jaxdistill.collect.teacher import TeacherConfig
from jaxdistill.curate import examples
from jaxdistill.curate.examples import answers_only, chains_to_examples
from jaxdistill.errors import RunError, UserError
from jaxdistill.local_teacher.answers import Faults, body_hash
from jaxdistill.local_teacher.problems import generate
from jaxdistill.local_teacher.server import TeacherOptions, running_teacher
from jaxdistill.records import Chain, Example, Problem, read_jsonl, write_jsonl

FAULTS = Faults(rate_limited=0.08, server_error=0.05, truncated=0.08, wrong=0.1)


def config_for(folder: Path, base_url: str, problems: list[Problem], **changes: Any) -> CollectConfig:
    write_jsonl(folder / "problems.jsonl", problems)
    teacher = TeacherConfig(base_url=base_url, max_tokens=400, backoff_s=0.05, attempt_limit=12, **changes)
    return CollectConfig(problems=folder / "problems.jsonl", workdir=folder / "run", teacher=teacher)


def test_verified_chains_and_a_receipt_for_every_other(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    problems = generate("all", 150, seed=0, split="train")
    open_problem = Problem(id="open", problem="Is P equal to NP?")
    log = tmp_path / "log.jsonl"
    with running_teacher(TeacherOptions(faults=FAULTS, retry_after_s=0, log=log)) as base_url:
        config = config_for(tmp_path, base_url, [*problems, open_problem], input_price_usd=0.0, output_price_usd=2.0)
        counts = main(config)
        outcomes = collections.Counter(entry["outcome"] for entry in log_entries(log))
        assert counts == {
            "verified": outcomes["right"],
            "wrong": outcomes["wrong"],
            "truncated": outcomes["truncated"],
            "failed": 0,
            "unverifiable": 1,
        }
        assert sum(counts.values()) == 151
        printed = capsys.readouterr().err
        assert f"collect: {counts['verified']} verified, " in printed
        assert f"kept in {config.workdir / 'chains.jsonl'}" in printed
        written = {name: (config.workdir / name).read_bytes() for name in ("chains.jsonl", "dropped.jsonl")}
        assert main(config) == counts  # nothing is asked again, and the same bytes are written
        assert len(log_entries(log)) == sum(outcomes.values())
        assert written == {name: (config.workdir / name).read_bytes() for name in written}
    gold = {p.id: p.answer for p in problems}
    chains = list(read_jsonl(config.workdir / "chains.jsonl", Chain))
    dropped = list(read_jsonl(config.workdir / "dropped.jsonl", Receipt))
    assert {c.problem_id for c in chains} | {r.problem_id for r in dropped} == {*gold, "open"}
    for chain in chains:
        assert chain.reasoning_kind == "full"
        assert chain.verdict.extracted == gold[chain.problem_id]
        assert chain.messages[-1]["reasoning_content"].startswith("Plan")
        assert chain.cost_usd == pytest.approx(chain.usage.output_tokens * 2e-6)
    assert all(receipt.detail for receipt in dropped)
    manifest = json.loads((config.workdir / "manifest.json").read_text())
    assert manifest["counts"] == counts
    assert manifest["cost_usd"] > sum(chain.cost_usd for chain in chains)  # wrong and truncated answers cost too
    assert json.loads((config.workdir / "config.json").read_text())["teacher"]["max_tokens"] == 400


def test_retry_after_is_honoured(tmp_path: Path):
    log = tmp_path / "log.jsonl"
    faults = Faults(rate_limited=0.4)
    with running_teacher(TeacherOptions(faults=faults, retry_after_s=1, log=log)) as base_url:
        counts = main(config_for(tmp_path, base_url, generate("turns", 15, seed=1, split="train")))
    assert counts["verified"] == 15
    waits = []
    refused: dict[str, float] = {}
    for entry in log_entries(log):
        if entry["body_sha256"] in refused:
            waits.append(entry["received"] - refused.pop(entry["body_sha256"]))
        if entry["status"] == 429:
            refused[entry["body_sha256"]] = entry["answered"]
    assert len(waits) > 3
    assert not refused
    assert min(waits) >= 1.0
    assert max(waits) < 6.0


def test_changed_parameters_never_reuse_an_answer_and_samples_are_calls_of_their_own(tmp_path: Path):
    log = tmp_path / "log.jsonl"
    with running_teacher(TeacherOptions(log=log)) as base_url:
        config = config_for(tmp_path, base_url, generate("relay", 5, seed=1, split="train"))
        for changed, asked in (
            (config, 5),
            (dataclasses.replace(config, samples_per_problem=3), 15),
            (dataclasses.replace(config, prompt=""), 20),
            (dataclasses.replace(config, teacher=dataclasses.replace(config.teacher, temperature=0.5)), 25),
        ):
            main(changed)
            assert len(log_entries(log)) == asked


def test_refused_requests_are_sent_once_and_lost_ones_again(tmp_path: Path):
    log = tmp_path / "log.jsonl"
    problems = generate("checksum", 4, seed=1, split="train")
    with running_teacher(TeacherOptions(log=log)) as base_url:
        config = config_for(tmp_path, base_url, problems, extra={"top_k": 5}, temperature=2.5)
        for _ in range(2):
            with pytest.raises(
                RunError, match=r"nothing was kept \(0 verified, 0 wrong, 0 truncated, 4 failed.* HTTP 400"
            ):
                main(config)
        assert [entry["status"] for entry in log_entries(log)] == [400] * 4
    receipt = next(read_jsonl(config.workdir / "dropped.jsonl", Receipt))
    assert "HTTP 400" in receipt.detail
    assert "temperature is 2.5" in receipt.detail
    lost = dataclasses.replace(config.teacher, temperature=None, attempt_limit=2)  # the server is gone by now
    with pytest.raises(RunError, match=r"4 of 4 requests have no answer .*no connection.*run the same command again"):
        main(dataclasses.replace(config, teacher=lost))
    assert json.loads((config.workdir / "manifest.json").read_text())["counts"]["failed"] == 4
    receipt = next(read_jsonl(config.workdir / "dropped.jsonl", Receipt))
    assert "no connection" in receipt.detail
    assert "2 attempts" in receipt.detail
    with running_teacher() as base_url:
        back = dataclasses.replace(lost, base_url=base_url)
        assert main(dataclasses.replace(config, teacher=back))["verified"] == 4


def test_a_server_that_always_fails_is_given_up_after_the_attempt_limit(tmp_path: Path):
    log = tmp_path / "log.jsonl"
    with running_teacher(TeacherOptions(faults=Faults(server_error=1.0), log=log)) as base_url:
        config = config_for(tmp_path, base_url, generate("turns", 2, seed=1, split="train"))
        teacher = dataclasses.replace(config.teacher, attempt_limit=3, backoff_s=0.01)
        with pytest.raises(RunError, match=r"2 of 2 requests have no answer .*HTTP 500"):
            main(dataclasses.replace(config, teacher=teacher))
    assert [entry["status"] for entry in log_entries(log)] == [500] * 6


def test_a_wrong_key_or_model_stops_the_run_at_once_and_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
):
    good, bad = "sk-good-key-0123456789", "sk-bad-key-9876543210"
    log = tmp_path / "log.jsonl"
    options = TeacherOptions(key_sha256=hashlib.sha256(good.encode()).hexdigest(), log=log)
    with running_teacher(options) as base_url:
        config = config_for(tmp_path, base_url, generate("turns", 30, seed=1, split="train"), in_flight=2)
        monkeypatch.setenv("OPENAI_API_KEY", bad)
        with pytest.raises(UserError, match="OPENAI_API_KEY") as caught:
            main(config)
        assert bad not in str(caught.value)
        assert len(log_entries(log)) <= 4
        monkeypatch.setenv("OPENAI_API_KEY", good)
        with pytest.raises(UserError, match="no such model"):
            main(dataclasses.replace(config, teacher=dataclasses.replace(config.teacher, model="gpt")))
        assert main(config)["verified"] == 30
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) >= 7
    for path in files:
        assert good.encode() not in path.read_bytes(), path
        assert bad.encode() not in path.read_bytes(), path
    printed = capfd.readouterr()
    assert good not in printed.out + printed.err


def finished_bodies(ledger: Path) -> dict[str, bytes]:
    """Hash of the body -> raw answer, for every finished request of a ledger that nobody holds."""
    database = sqlite3.connect(ledger)
    rows = database.execute("SELECT body, raw FROM requests JOIN responses USING (key) WHERE state = 'done'").fetchall()
    database.close()
    return {body_hash(json.loads(body)): raw for body, raw in rows}


def test_killed_at_random_moments_no_finished_request_is_asked_again(tmp_path: Path):
    log = tmp_path / "log.jsonl"
    options = TeacherOptions(faults=FAULTS, latency_s=0.03, retry_after_s=0, log=log)
    with running_teacher(options) as base_url:
        config = config_for(tmp_path, base_url, generate("all", 200, seed=2, split="train"), in_flight=8)
        program = f"""
from pathlib import Path
from jaxdistill.collect.teacher import TeacherConfig
from jaxdistill.collect.run import CollectConfig, main
problems, workdir = Path({str(config.problems)!r}), Path({str(config.workdir)!r})
main(CollectConfig(problems=problems, workdir=workdir, teacher={config.teacher!r}))
"""
        kept: dict[str, bytes] = {}
        for kill_at in (40, 90, 150):  # log lines
            process = subprocess.Popen(
                [sys.executable, "-c", program], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
            )
            deadline = time.monotonic() + 60
            while len(log_entries(log)) < kill_at and process.poll() is None:
                assert time.monotonic() < deadline
                time.sleep(0.005)
            os.kill(process.pid, signal.SIGKILL)
            assert process.wait() == -signal.SIGKILL
            time.sleep(0.1)  # requests under way reach the log
            before = finished_bodies(config.workdir / "ledger.sqlite")
            assert kept.items() <= before.items()
            _assert_none_repeated(log, kept)
            kept = before
            (tmp_path / "mark").write_text(str(len(log_entries(log))))
        assert 60 < len(kept) < 190
        counts = main(config)
        assert sum(counts.values()) == 200
        assert counts["failed"] == 0
        after = finished_bodies(config.workdir / "ledger.sqlite")
        assert kept.items() <= after.items()
        assert len(after) == 200
        _assert_none_repeated(log, kept)
    # Over the whole run the only answers asked for twice are those in flight when the process was killed.
    answered = collections.Counter(entry["body_sha256"] for entry in log_entries(log) if entry["status"] == 200)
    assert set(answered) == set(after)
    assert sum(answered.values()) - 200 <= 3 * config.teacher.in_flight


def _assert_none_repeated(log: Path, kept: dict[str, bytes]) -> None:
    """No request that was finished at the last kill is in the log after it."""
    mark = log.parent / "mark"
    later = log_entries(log)[int(mark.read_text()) :] if mark.exists() else []
    assert not {entry["body_sha256"] for entry in later} & kept.keys()


def test_bad_problem_files_are_named_before_anything_is_sent(tmp_path: Path):
    config = CollectConfig(
        problems=tmp_path / "problems.jsonl",
        workdir=tmp_path / "run",
        teacher=TeacherConfig(base_url="http://127.0.0.1:9/v1"),
    )
    with pytest.raises(UserError, match="no such file"):
        main(config)
    good = '{"id": "a", "problem": "1 + 1?", "answer": "2"}\n'
    for text, words in (
        ("", "found no row that can be read, expected one a line"),
        (good + "{broken\n", "problems.jsonl:2: malformed: not valid JSON"),
        (good + '{"id": "b"}\n', r"problems.jsonl:2: malformed: .*missing fields \['problem'\]"),
        (good + '{"id": 3, "problem": "?"}\n', "problems.jsonl:2: malformed: id: found 3"),
        (good + good, "line 2 repeats the id 'a' of line 1; expected an id of its own a row"),
    ):
        config.problems.write_text(text)
        with pytest.raises(UserError, match=words):
            main(dataclasses.replace(config, strict=True))
    assert not config.workdir.exists()
    config.problems.write_text(good)
    with pytest.raises(UserError, match="prompt 'nope'"):
        main(dataclasses.replace(config, prompt="nope"))
    with pytest.raises(UserError, match="samples_per_problem is 0"):
        dataclasses.replace(config, samples_per_problem=0)
    with pytest.raises(UserError, match="verify_timeout_s"):
        dataclasses.replace(config, verify_timeout_s=0.0)


def test_problems_without_answers_give_a_reason_and_no_success(tmp_path: Path):
    config = config_for(tmp_path, "http://127.0.0.1:9/v1", [Problem(id="open", problem="?")])
    with pytest.raises(RunError, match=r"nothing was kept .*1 unverifiable.*no gold answer"):
        main(config)
    chains, receipts = config.workdir / "chains.jsonl", config.workdir / "dropped.jsonl"
    assert [receipt.problem_id for receipt in read_jsonl(receipts, Receipt)] == ["open"]
    with pytest.raises(UserError, match=r"chains\.jsonl: holds no chain"):
        examples.main(examples.ExamplesConfig(chains=chains, workdir=tmp_path / "examples"))
    assert not (tmp_path / "examples").exists()


def test_chains_become_examples_in_one_format(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    problems = generate("all", 3, seed=6, split="train")
    with running_teacher() as base_url:
        config = config_for(tmp_path, base_url, problems)
        main(config)
    folder = tmp_path / "examples"
    assert examples.main(examples.ExamplesConfig(chains=config.workdir / "chains.jsonl", workdir=folder)) == 3
    assert (
        f"examples: 3 from {config.workdir / 'chains.jsonl'} in {folder / 'examples.jsonl'}" in capsys.readouterr().err
    )
    chains = list(read_jsonl(config.workdir / "chains.jsonl", Chain))
    rows = list(read_jsonl(folder / "examples.jsonl", Example))
    assert rows == list(chains_to_examples(chains))
    for problem, chain, example in zip(problems, chains, rows, strict=True):
        user, assistant = example.messages
        thought, content = chain.messages[-1]["reasoning_content"], chain.messages[-1]["content"]
        assert user == {"role": "user", "content": problem.problem}
        assert assistant["content"] == f"<think>\n{thought}\n</think>\n{content}"
        assert example.provenance == (chain.id,)
    silent = dataclasses.replace(chains[0], messages=({"role": "assistant", "content": "4"},))
    assert next(chains_to_examples([silent])).messages[-1]["content"] == "4"
    alone = list(answers_only(problems))
    assert [e.messages[-1]["content"] for e in alone] == [f"\\boxed{{{p.answer}}}" for p in problems]
    with pytest.raises(UserError, match="has no answer"):
        list(answers_only([Problem(id="open", problem="?")]))
