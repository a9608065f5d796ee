"""The four transports against the real teacher process: one record each, and nothing asked twice after a kill."""

import collections
import dataclasses
import json
import sqlite3
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from rows import log_entries

from jaxdistill.collect import batch
from jaxdistill.collect.profiles import Transport
from jaxdistill.collect.run import CollectConfig, main
from jaxdistill.collect.teacher import TeacherConfig
from jaxdistill.errors import RunError, UserError
from jaxdistill.local_teacher.answers import Faults
from jaxdistill.local_teacher.app import TeacherOptions
from jaxdistill.local_teacher.problems import generate
from jaxdistill.local_teacher.server import running_teacher
from jaxdistill.records import Chain, read_jsonl, write_jsonl

KINDS = {"chat": "full", "responses": "summary", "background": "summary", "batch": "full", "responses_batch": "summary"}


def config_for(folder: Path, base_url: str, count: int = 12, **changes: Any) -> CollectConfig:
    write_jsonl(folder / "problems.jsonl", generate("all", count, seed=1, split="train"))
    settings = {"max_tokens": 400, "backoff_s": 0.02, "poll_s": 0.05, "attempt_limit": 12, **changes}
    teacher = TeacherConfig(base_url=base_url, profile="local", **settings)
    return CollectConfig(problems=folder / "problems.jsonl", workdir=folder / "run", teacher=teacher)


def chains_of(config: CollectConfig) -> list[Chain]:
    return list(read_jsonl(config.workdir / "chains.jsonl", Chain))


@pytest.mark.parametrize("transport", KINDS)
def test_every_transport_gives_the_same_record(transport: Transport, tmp_path: Path):
    log = tmp_path / "log.jsonl"
    faults = Faults(server_error=0.1, wrong=0.2)
    with running_teacher(TeacherOptions(faults=faults, seed=2, log=log, latency_s=0.05)) as base_url:
        config = config_for(tmp_path, base_url, transport=transport)
        counts = main(config)
        assert counts["verified"] + counts["wrong"] == 12
        assert counts["wrong"] > 0
        asked = len(log_entries(log))
        assert asked > 12  # a server error was asked again
        assert main(config) == counts
        assert len(log_entries(log)) == asked
    for chain in chains_of(config):
        assert chain.reasoning_kind == KINDS[transport]
        assert chain.messages[-1]["reasoning_content"].startswith("Plan")
        assert chain.teacher == "local-teacher"
        assert chain.request_id
        assert chain.prompt.startswith("long_thought.v1@")
        assert 0 < chain.usage.reasoning_tokens < chain.usage.output_tokens
        in_batches = transport in ("batch", "responses_batch")
        assert 0.04 < chain.latency_s < 60 or in_batches
        share = 0.5 if in_batches else 1.0
        full = (chain.usage.prompt_tokens * 1.0 + chain.usage.output_tokens * 4.0) / 1e6
        assert chain.cost_usd == pytest.approx(full * share, abs=1e-9)


def test_an_answer_in_the_background_survives_a_kill_and_is_fetched_by_its_id(tmp_path: Path):
    log = tmp_path / "log.jsonl"
    with running_teacher(TeacherOptions(log=log, latency_s=3.0)) as base_url:
        config = config_for(tmp_path, base_url, transport="background")
        process = subprocess.Popen([sys.executable, "-c", program(config)], stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + 60
        while accepted(config.workdir / "ledger.sqlite") < 12:
            assert time.monotonic() < deadline
            time.sleep(0.02)
        process.kill()
        process.wait()
        assert main(config)["verified"] == 12
        assert len(log_entries(log)) == 12
    manifest = json.loads((config.workdir / "manifest.json").read_text())
    assert manifest["lost_usd_at_most"] == 0


def program(config: CollectConfig) -> str:
    return f"""
from pathlib import Path, PosixPath
from jaxdistill.collect.run import CollectConfig, main
from jaxdistill.collect.teacher import TeacherConfig
main({config!r})
"""


def accepted(ledger: Path) -> int:
    """Requests that the server is known to work on."""
    if not ledger.exists():
        return 0
    database = sqlite3.connect(ledger, timeout=10)
    try:
        return database.execute("SELECT count(*) FROM requests WHERE remote IS NOT NULL").fetchone()[0]
    except sqlite3.OperationalError:  # not made yet
        return 0
    finally:
        database.close()


def test_batches_are_sharded_and_an_expired_one_keeps_what_it_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(batch, "MOST_REQUESTS", 5)
    log = tmp_path / "log.jsonl"
    options = TeacherOptions(log=log, batch_s=0.2, batch_expired=0.3, faults=Faults(server_error=0.1), seed=3)
    with running_teacher(options) as base_url:
        config = config_for(tmp_path, base_url, transport="batch")
        assert main(config)["verified"] == 12
    answered = [entry["body_sha256"] for entry in log_entries(log) if entry["status"] == 200]
    assert len(answered) == len(set(answered)) == 12  # what an expired batch had was not asked for again
    database = sqlite3.connect(config.workdir / "ledger.sqlite")
    states = database.execute("SELECT state, count(*) FROM batches GROUP BY state").fetchall()
    database.close()
    assert states == [("finished", states[0][1])]
    assert states[0][1] >= 4


def test_a_file_is_cut_where_it_grows_too_large(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(batch, "MOST_BYTES", 6000)
    with running_teacher() as base_url:
        config = config_for(tmp_path, base_url, transport="batch")
        assert main(config)["verified"] == 12
    database = sqlite3.connect(config.workdir / "ledger.sqlite")
    assert database.execute("SELECT count(*) FROM batches").fetchone()[0] >= 3
    database.close()


@pytest.mark.parametrize("killed_at", ["POST /files", "POST /batches", "after POST /batches", "GET /batches"])
def test_a_batch_is_found_again_after_a_kill_at_any_point(killed_at: str, tmp_path: Path):
    """The tracker is written before the submission: a batch that was made is adopted, never repeated."""
    log = tmp_path / "log.jsonl"
    with running_teacher(TeacherOptions(log=log, batch_s=0.3)) as base_url:
        config = config_for(tmp_path, base_url, transport="batch")
        killer = f"""
import os, signal
from jaxdistill.collect.api import Api
call = Api.call
async def deadly(self, method, path, *rest, **options):
    at = {killed_at!r}.split()
    here = method in at and path.split("?")[0].startswith(at[-1])
    if here and at[0] != "after":
        os.kill(os.getpid(), signal.SIGKILL)
    reply = await call(self, method, path, *rest, **options)
    if here:
        os.kill(os.getpid(), signal.SIGKILL)
    return reply
Api.call = deadly
"""
        done = subprocess.run([sys.executable, "-c", killer + program(config)], capture_output=True, timeout=60)
        assert done.returncode == -9, done.stderr
        assert main(dataclasses.replace(config, budget_usd=1.0))["verified"] == 12
        assert main(config)["verified"] == 12
    bodies = collections.Counter(entry["body_sha256"] for entry in log_entries(log))
    assert len(bodies) == 12
    assert set(bodies.values()) == {1}


def test_a_batch_of_an_earlier_run_is_fetched_whatever_the_transport(tmp_path: Path):
    log = tmp_path / "log.jsonl"
    with running_teacher(TeacherOptions(log=log, batch_s=2.0)) as base_url:
        config = config_for(tmp_path, base_url, transport="batch")
        process = subprocess.Popen([sys.executable, "-c", program(config)], stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + 60
        while accepted(config.workdir / "ledger.sqlite") < 12 or "submitted" not in batch_states(config):
            assert time.monotonic() < deadline
            time.sleep(0.02)
        process.kill()
        process.wait()
        chat = dataclasses.replace(config, teacher=dataclasses.replace(config.teacher, transport="chat"))
        assert main(chat)["verified"] == 12
        assert len(log_entries(log)) == 12


def batch_states(config: CollectConfig) -> list[str]:
    database = sqlite3.connect(config.workdir / "ledger.sqlite", timeout=10)
    states = [state for (state,) in database.execute("SELECT state FROM batches")]
    database.close()
    return states


def test_a_provider_without_batches_ends_the_run_and_nothing_is_out(tmp_path: Path):
    with running_teacher() as base_url:
        config = config_for(tmp_path, base_url.removesuffix("/v1") + "/v2", transport="batch")
        with pytest.raises(UserError, match=r"the provider takes no batch: .*no such model or path"):
            main(config)
        moved = dataclasses.replace(config.teacher, base_url=base_url)
        assert main(dataclasses.replace(config, teacher=moved))["verified"] == 12


def test_an_answer_that_the_server_forgot_is_asked_for_again_at_its_worst_case(tmp_path: Path):
    with running_teacher(TeacherOptions(latency_s=3.0)) as base_url:
        config = config_for(tmp_path, base_url, count=3, transport="background")
        process = subprocess.Popen([sys.executable, "-c", program(config)], stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + 60
        while accepted(config.workdir / "ledger.sqlite") < 3:
            assert time.monotonic() < deadline
            time.sleep(0.02)
        process.kill()
        process.wait()
    with running_teacher() as base_url:  # another server, which knows nothing
        moved = dataclasses.replace(config.teacher, base_url=base_url)
        assert main(dataclasses.replace(config, teacher=moved))["verified"] == 3
    manifest = json.loads((config.workdir / "manifest.json").read_text())
    assert manifest["lost_usd_at_most"] > 0
    with pytest.raises(RunError, match="the budget leaves no room"):
        main(dataclasses.replace(config, samples_per_problem=2, budget_usd=manifest["spent_usd"] + 1e-6))
