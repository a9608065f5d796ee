"""Money, rates and interruptions against the real teacher process: what is never passed, and how a run ends."""

import collections
import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from rows import log_entries

from jaxdistill.collect.run import CollectConfig, main
from jaxdistill.collect.teacher import TeacherConfig
from jaxdistill.errors import RunError, UserError
from jaxdistill.local_teacher.answers import Faults
from jaxdistill.local_teacher.app import TeacherOptions
from jaxdistill.local_teacher.problems import generate
from jaxdistill.local_teacher.server import running_teacher
from jaxdistill.records import Chain, read_json_objects, read_jsonl, write_jsonl

PROGRAM = """
from pathlib import Path, PosixPath
from jaxdistill import cli
from jaxdistill.collect import run
from jaxdistill.collect.run import CollectConfig
from jaxdistill.collect.teacher import TeacherConfig
config = {config!r}
cli.load = lambda *_: config
cli.main(["collect"])
"""


def config_for(folder: Path, base_url: str, count: int, **changes: Any) -> CollectConfig:
    write_jsonl(folder / "problems.jsonl", generate("all", count, seed=1, split="train"))
    settings = {"max_tokens": 400, "backoff_s": 0.02, "attempt_limit": 12, **changes}
    teacher = TeacherConfig(base_url=base_url, profile="local", **settings)
    return CollectConfig(problems=folder / "problems.jsonl", workdir=folder / "run", teacher=teacher)


def manifest_of(config: CollectConfig) -> dict[str, Any]:
    return json.loads((config.workdir / "manifest.json").read_text())


def test_a_budget_in_dollars_holds_and_is_used_up(tmp_path: Path):
    """One costs about 0.0006 dollars and 0.003 at its worst: 0.01 dollars answer more than 0.01 / 0.003."""
    log = tmp_path / "log.jsonl"
    with running_teacher(TeacherOptions(log=log, faults=Faults(server_error=0.1))) as base_url:
        config = dataclasses.replace(config_for(tmp_path, base_url, 40), budget_usd=0.01)
        with pytest.raises(RunError, match=r"the budget leaves no room .*raise it and run the same command again"):
            main(config)
        manifest = manifest_of(config)
        assert 0.007 < manifest["spent_usd"] <= 0.01
        assert manifest["cost_usd"] == pytest.approx(manifest["spent_usd"])
        chains = list(read_jsonl(config.workdir / "chains.jsonl", Chain))
        assert 10 < len(chains) < 20
        assert sum(chain.cost_usd for chain in chains) == pytest.approx(manifest["spent_usd"])
        with pytest.raises(RunError, match="the budget leaves no room"):  # it holds over runs
            main(config)
        assert manifest_of(config)["spent_usd"] <= 0.01
        assert main(dataclasses.replace(config, budget_usd=None))["verified"] == 40
        assert sum(entry["status"] == 200 for entry in log_entries(log)) == 40


def test_a_budget_in_tokens_holds(tmp_path: Path):
    with running_teacher() as base_url:
        config = dataclasses.replace(config_for(tmp_path, base_url, 40), budget_tokens=9000)
        with pytest.raises(RunError, match="the budget leaves no room"):
            main(config)
    assert 6000 < manifest_of(config)["spent_tokens"] <= 9000


def test_a_price_that_nobody_knows_refuses_to_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-very-secret-1234")
    config = config_for(tmp_path, "https://example.invalid/v1", 3)
    teacher = dataclasses.replace(config.teacher, profile=None, model="unheard-of", attempt_limit=1)
    config = dataclasses.replace(config, teacher=teacher)
    with pytest.raises(UserError, match=r"nobody knows the price of unheard-of.*--unknown-price to go on"):
        main(config)
    assert not config.workdir.exists()
    with pytest.raises(UserError, match="budget_usd cannot hold without a price"):
        main(dataclasses.replace(config, unknown_price=True, budget_usd=1.0))
    capsys.readouterr()
    with pytest.raises(RunError, match="no connection"):
        main(dataclasses.replace(config, unknown_price=True))
    assert "asking unheard-of at https://example.invalid/v1; read the provider's terms" in capsys.readouterr().err
    assert "sk-very" not in "".join(path.read_text(errors="replace") for path in config.workdir.rglob("*.*"))


def test_a_truncated_answer_costs_one_larger_try_at_most(tmp_path: Path):
    log = tmp_path / "log.jsonl"
    with running_teacher(TeacherOptions(log=log)) as base_url:
        config = config_for(tmp_path, base_url, 3, max_tokens=20, larger_max_tokens=40)
        with pytest.raises(RunError, match=r"nothing was kept .*3 truncated"):
            main(config)
        with pytest.raises(RunError, match="3 truncated"):
            main(config)
        assert len(log_entries(log)) == 6  # three, and three larger ones; never again
        larger = dataclasses.replace(config.teacher, max_tokens=20, larger_max_tokens=400)
        assert main(dataclasses.replace(config, teacher=larger))["verified"] == 3
        assert len(log_entries(log)) == 9
    costs = manifest_of(config)["cost_usd"]
    chains = list(read_jsonl(config.workdir / "chains.jsonl", Chain))
    assert costs > sum(chain.cost_usd for chain in chains)  # the first tries were paid for too


def test_until_enough_are_verified(tmp_path: Path):
    log = tmp_path / "log.jsonl"
    with running_teacher(TeacherOptions(log=log, faults=Faults(wrong=0.5), seed=4)) as base_url:
        config = config_for(tmp_path, base_url, 20)
        config = dataclasses.replace(config, samples_per_problem=5, until_verified=2)
        counts = main(config)
        asked = len(log_entries(log))
        assert main(config) == counts
        assert len(log_entries(log)) == asked == counts["verified"] + counts["wrong"]
        rates = [row for _, row in read_json_objects(config.workdir / "pass_rates.jsonl")]
        assert len(rates) == 20
        for rate in rates:
            assert rate["verified"] == 2 or rate["judged"] == 5
            assert rate["verified"] <= 2 <= rate["judged"] <= 5
        assert len({rate["judged"] for rate in rates}) > 2
        assert main(dataclasses.replace(config, until_verified=None))["wrong"] > counts["wrong"]
        assert len(log_entries(log)) == 100


def test_a_dry_run_sends_and_writes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    config = dataclasses.replace(config_for(tmp_path, "http://127.0.0.1:9/v1", 10), dry_run=True)
    assert main(config) == {}
    assert not config.workdir.exists()
    rows = dict(line.split("  ", 1) for line in capsys.readouterr().out.splitlines())
    assert rows["requests to send"].strip() == "10"
    worst = 10 * (1.0 * 1280 + 4.0 * 400) / 1e6  # 1280: bytes of the prompt and the template, in steps of 256
    assert rows["worst case"].split()[0] == f"${worst:,.2f},"
    assert "25% of max_tokens = 100 output tokens an answer" in rows["assumed"]
    with running_teacher() as base_url:
        real = dataclasses.replace(
            config, dry_run=False, teacher=dataclasses.replace(config.teacher, base_url=base_url)
        )
        main(real)
    more = dataclasses.replace(config, samples_per_problem=2)
    main(more)
    rows = dict(line.split("  ", 1) for line in capsys.readouterr().out.splitlines() if "  " in line)
    assert (rows["requests to send"].strip(), rows["already answered"].strip()) == ("10", "10")
    assert rows["assumed"].strip().startswith("10 answers in this folder")


def test_the_worst_case_of_a_dry_run_holds_all_that_may_be_sent(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """Larger tries, further samples, the judge; and a run that goes as badly as it can costs no more."""

    def worst(config: CollectConfig) -> dict[str, float]:
        main(dataclasses.replace(config, dry_run=True))
        rows = dict(line.split("  ", 1) for line in capsys.readouterr().out.splitlines())
        return {name: float(row.split()[0].strip("$,")) for name, row in rows.items() if "worst case" in name}

    prices = {"input_price_usd": 1000.0, "output_price_usd": 4000.0}
    with running_teacher() as base_url:
        config = config_for(tmp_path, base_url, 10, max_tokens=20, larger_max_tokens=40, **prices)
        bare = dataclasses.replace(config, teacher=dataclasses.replace(config.teacher, larger_max_tokens=None))
        plain = worst(bare)["worst case"]
        larger = 2 * plain + 10 * 4 * 20 / 1000  # the prompt once more, and the larger answer
        assert worst(config) == {"worst case": pytest.approx(larger)}
        more = dataclasses.replace(config, samples_per_problem=3, until_verified=1)
        assert worst(more) == {"worst case": pytest.approx(3 * larger)}
        judged = worst(dataclasses.replace(more, judge=bare.teacher))
        assert judged["worst case of both"] == pytest.approx(3 * larger + judged["the judge's worst case"])
        assert judged["the judge's worst case"] > 30 * 4 * 4096 / 1000  # an answer of 4,096 characters in each
        with pytest.raises(RunError, match=r"nothing was kept .*30 truncated"):
            main(more)
        assert 0.2 * 3 * larger < manifest_of(more)["spent_usd"] <= 3 * larger
    journey = dataclasses.replace(bare, method="journey")
    assert worst(journey)["worst case"] > 5 * plain


def test_limits_that_a_server_tells_are_kept(tmp_path: Path):
    """60 requests at once and 10 a second after that: 100 take 4 s, and the headers keep nearly all 429s away."""
    log = tmp_path / "log.jsonl"
    options = TeacherOptions(log=log, requests_per_minute=60, minute_s=6.0, enforce_limits=True)
    with running_teacher(options) as base_url:
        started = time.monotonic()
        assert main(config_for(tmp_path, base_url, 100))["verified"] == 100
        assert time.monotonic() - started > 3.5
    outcomes = collections.Counter(entry["outcome"] for entry in log_entries(log))
    assert outcomes["right"] == 100
    assert outcomes["over_limit"] < 15, outcomes


def script(folder: Path, *lines: dict[str, Any]) -> Path:
    path = folder / "script.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_retries_are_interleaved_with_new_work(tmp_path: Path):
    log = tmp_path / "log.jsonl"
    options = TeacherOptions(log=log, latency_s=0.05, script=script(tmp_path, {"status": 500}, {"drop": True}))
    with running_teacher(options) as base_url:
        assert main(config_for(tmp_path, base_url, 60, in_flight=2))["verified"] == 60
    entries = log_entries(log)
    failed = {entry["body_sha256"]: place for place, entry in enumerate(entries) if entry["status"] != 200}
    assert len(failed) == 2
    for name, place in failed.items():
        again = next(p for p, entry in enumerate(entries) if entry["body_sha256"] == name and p > place)
        assert again < 40, "asked again while new ones go on, not after all of them"


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ({"status": 401}, "HTTP 401 .*set OPENAI_API_KEY"),
        ({"status": 429, "code": "insufficient_quota"}, "the quota of this key is used up"),
    ],
)
def test_what_is_under_way_finishes_when_the_account_is_refused(line: dict[str, Any], words: str, tmp_path: Path):
    """The answers that come after the error are kept: they are billed."""
    log = tmp_path / "log.jsonl"
    slow = {"delay_s": 1.0}
    options = TeacherOptions(log=log, script=script(tmp_path, slow, slow, slow, line))
    with running_teacher(options) as base_url:
        config = config_for(tmp_path, base_url, 30, in_flight=4)
        with pytest.raises(UserError, match=words):
            main(config)
        answered = [entry["body_sha256"] for entry in log_entries(log) if entry["status"] == 200]
        assert len(answered) == 3
        assert main(config)["verified"] == 30
        asked = collections.Counter(entry["body_sha256"] for entry in log_entries(log) if entry["status"] == 200)
        assert len(asked) == 30
        assert set(asked.values()) == {1}


def test_a_burst_of_refusals_ends_the_run_and_says_why(tmp_path: Path):
    log = tmp_path / "log.jsonl"
    with running_teacher(TeacherOptions(log=log)) as base_url:
        config = config_for(tmp_path, base_url, 60, temperature=2.5, refusal_limit=5, in_flight=2)
        with pytest.raises(UserError, match=r"the last 5 requests were all refused: HTTP 400: .*temperature is 2\.5"):
            main(config)
    assert len(log_entries(log)) < 12


def wait_for(log: Path, lines: int) -> None:
    deadline = time.monotonic() + 60
    while len(log_entries(log)) < lines:
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.parametrize("presses", [1, 2])
def test_ctrl_c_finishes_what_is_under_way_and_a_second_one_stops_at_once(presses: int, tmp_path: Path):
    log = tmp_path / "log.jsonl"
    with running_teacher(
        TeacherOptions(log=log, script=script(tmp_path, *[{}] * 8, *[{"delay_s": 4.0}] * 4))
    ) as base_url:
        config = config_for(tmp_path, base_url, 40, in_flight=4)
        process = subprocess.Popen(
            [sys.executable, "-c", PROGRAM.format(config=config)], stderr=subprocess.PIPE, text=True
        )
        wait_for(log, 8)
        time.sleep(1.0)  # four are under way now, which take 4 s
        pressed = time.monotonic()
        for press in range(presses):
            process.send_signal(signal.SIGINT)
            time.sleep(0.3 if press == 0 else 0)
        _, printed = process.communicate(timeout=60)
        wall_s = time.monotonic() - pressed
        assert process.returncode == 1
        assert "interrupted; run the same command again to go on" in printed
        answered = sum(entry["status"] == 200 for entry in log_entries(log))
        if presses == 1:
            assert answered == 12
            assert len(list(read_jsonl(config.workdir / "chains.jsonl", Chain))) == 12
        else:
            assert wall_s < 2.5
            time.sleep(3)
        assert main(config)["verified"] == 40
        asked = sum(entry["status"] == 200 for entry in log_entries(log))
        assert asked == 40 if presses == 1 else 40 <= asked <= 44


def test_several_processes_share_one_ledger_and_one_budget(tmp_path: Path):
    log = tmp_path / "log.jsonl"
    with running_teacher(TeacherOptions(log=log, latency_s=0.1, faults=Faults(server_error=0.1))) as base_url:
        config = dataclasses.replace(config_for(tmp_path, base_url, 60, in_flight=4), workers=3, budget_usd=0.02)
        with pytest.raises(RunError, match="the budget leaves no room"):
            main(config)
        assert 0.016 < manifest_of(config)["spent_usd"] <= 0.02
        assert main(dataclasses.replace(config, budget_usd=None))["verified"] == 60
        answered = collections.Counter(entry["body_sha256"] for entry in log_entries(log) if entry["status"] == 200)
    assert len(answered) == 60
    assert set(answered.values()) == {1}


def children_of(parent: int) -> list[int]:
    """Worker processes of a command."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            words = (path / "cmdline").read_bytes()
            status = (path / "status").read_text()
        except OSError:  # it has gone meanwhile
            continue
        if b"jaxdistill.collect.worker" in words and f"PPid:\t{parent}\n" in status:
            found.append(int(path.name))
    return found


def test_a_worker_that_dies_ends_the_run_and_loses_nothing(tmp_path: Path):
    log = tmp_path / "log.jsonl"
    with running_teacher(TeacherOptions(log=log, latency_s=0.5)) as base_url:
        config = dataclasses.replace(config_for(tmp_path, base_url, 40, in_flight=2), workers=2)
        process = subprocess.Popen(
            [sys.executable, "-c", PROGRAM.format(config=config)], stderr=subprocess.PIPE, text=True
        )
        deadline = time.monotonic() + 60
        while not (workers := children_of(process.pid)):
            assert time.monotonic() < deadline
            time.sleep(0.02)
        os.kill(workers[0], signal.SIGKILL)
        _, printed = process.communicate(timeout=60)
        assert process.returncode == 1
        assert "worker processes ended with exit codes [-9]" in printed
        assert main(config)["verified"] == 40
