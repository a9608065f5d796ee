"""What a user sees when the API, the disk or the address is not what it should be, and that nothing is paid twice."""

import collections
import dataclasses
import os
import shutil
import sqlite3
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from rows import log_entries

from jaxdistill.collect import spare
from jaxdistill.collect.run import CollectConfig, main
from jaxdistill.collect.teacher import TeacherConfig
from jaxdistill.errors import RunError, UserError
from jaxdistill.local_teacher.app import TeacherOptions
from jaxdistill.local_teacher.problems import generate
from jaxdistill.local_teacher.server import running_teacher
from jaxdistill.records import write_jsonl

PAGE = {"status": 200, "body": "<html>502 Bad Gateway</html>"}


def config_for(folder: Path, base_url: str, count: int = 12, **changes: Any) -> CollectConfig:
    write_jsonl(folder / "problems.jsonl", generate("all", count, seed=1, split="train"))
    settings = {"max_tokens": 400, "backoff_s": 0.02, "poll_s": 0.05, "attempt_limit": 12, **changes}
    teacher = TeacherConfig(base_url=base_url, profile="local", **settings)
    return CollectConfig(problems=folder / "problems.jsonl", workdir=folder / "run", teacher=teacher)


def answered(log: Path) -> collections.Counter[str]:
    """How often each request was answered, by the teacher's own log."""
    entries = log_entries(log)
    return collections.Counter(entry["body_sha256"] for entry in entries if entry["status"] == 200)


def command(config: CollectConfig, file_bytes: int | None = None) -> subprocess.CompletedProcess[str]:
    """The command in a process of its own, whose files may grow to so many bytes."""
    teacher = config.teacher
    words = [f"--problems={config.problems}", f"--workdir={config.workdir}", f"--teacher.base-url={teacher.base_url}"]
    words += ["--teacher.profile=local", f"--teacher.max-tokens={teacher.max_tokens}"]
    words += [f"--teacher.in-flight={teacher.in_flight}", f"--workers={config.workers}", "--teacher.backoff-s=0.02"]
    run = [sys.executable, "-m", "jaxdistill", "collect", *words]
    if file_bytes is not None:
        run = ["sh", "-c", f'ulimit -f {file_bytes // 512} && exec "$@"', "sh", *run]
    return subprocess.run(run, capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize(
    "script",
    [
        [{"at": "POST /v1/batches", "done": True, "drop": True}],  # made, and no word of it
        [{"at": "POST /v1/batches", "done": True, **PAGE}, {"at": "GET /v1/batches", **PAGE}],
        [{"at": "POST /v1/files", **PAGE}, {"at": "POST /v1/files", "status": 500}, {"at": "POST /v1/batches", **PAGE}],
        [{"at": "GET /v1/batches/", **PAGE}, {"at": "GET /v1/files", **PAGE}, {"at": "GET /v1/files", "drop": True}],
        [{"at": "GET /v1/files", "status": 200, "body": '["a"]'}, {"at": "GET /v1/files", "status": 429}],
    ],
    ids=lambda script: "+".join(line["at"] for line in script),
)
def test_a_batch_whose_calls_fail_is_made_once(script: list[dict[str, Any]], tmp_path: Path):
    path, log = tmp_path / "script.jsonl", tmp_path / "log.jsonl"
    write_jsonl(path, script)
    with running_teacher(TeacherOptions(log=log, script=path)) as base_url:
        config = config_for(tmp_path, base_url, transport="batch")
        assert main(config)["verified"] == 12
        assert main(config)["verified"] == 12
    assert set(answered(log).values()) == {1}
    assert len(answered(log)) == 12


def test_a_file_of_answers_that_is_gone_ends_the_run_and_says_so(tmp_path: Path):
    path = tmp_path / "script.jsonl"
    write_jsonl(path, [{"at": "GET /v1/files", "status": 404}])
    with running_teacher(TeacherOptions(script=path)) as base_url:
        config = config_for(tmp_path, base_url, transport="batch")
        with pytest.raises(UserError, match="HTTP 404"):
            main(config)
        assert main(config)["verified"] == 12


def test_a_page_in_place_of_a_poll_costs_nothing(tmp_path: Path):
    path, log = tmp_path / "script.jsonl", tmp_path / "log.jsonl"
    write_jsonl(path, [{"at": "GET /v1/responses/", **PAGE}, {"at": "GET /v1/responses/", "drop": True}] * 4)
    with running_teacher(TeacherOptions(log=log, script=path)) as base_url:
        assert main(config_for(tmp_path, base_url, transport="background"))["verified"] == 12
    assert set(answered(log).values()) == {1}


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ({"status": 308, "headers": {"location": "https://elsewhere.example/v1"}}, "points to https://elsewhere.ex"),
        ({"status": 405, "body": "<html>Not Allowed</html>"}, "HTTP 405 .*check base_url"),
    ],
)
def test_an_address_of_something_else_ends_the_run(line: dict[str, Any], words: str, tmp_path: Path):
    write_jsonl(tmp_path / "script.jsonl", [line])
    with running_teacher(TeacherOptions(script=tmp_path / "script.jsonl")) as base_url:
        config = config_for(tmp_path, base_url, in_flight=1)
        with pytest.raises(UserError, match=words):
            main(config)
        assert main(config)["verified"] == 12


def test_garbage_is_no_answer_and_is_printed_without_moving_the_cursor(tmp_path: Path):
    garbage = {"status": 200, "body": "\x1b[2J\a not gzip", "headers": {"content-encoding": "gzip"}}
    plain = {"status": 200, "body": "\x1b[2J\a nothing"}
    write_jsonl(tmp_path / "script.jsonl", [garbage, plain] * 6)
    with running_teacher(TeacherOptions(script=tmp_path / "script.jsonl")) as base_url:
        config = config_for(tmp_path, base_url, count=3, attempt_limit=2)
        with pytest.raises(RunError, match=r"3 of 3 requests have no answer yet") as caught:
            main(config)
        assert str(caught.value).isprintable()
        receipts = (config.workdir / "dropped.jsonl").read_text()
        assert "cannot be decoded" in receipts or "not a chat completion" in receipts
        assert "\\u001b" not in receipts
        with pytest.raises(RunError):
            main(config)
        assert main(config)["verified"] == 3


def test_a_file_that_may_not_grow_ends_the_run_with_one_message(tmp_path: Path):
    with running_teacher() as base_url:
        config = config_for(tmp_path, base_url, count=150)
        config = dataclasses.replace(config, teacher=dataclasses.replace(config.teacher, max_tokens=32_768))
        done = command(config, file_bytes=5 << 20)  # 12 MB are to be set aside
        assert done.returncode == 1
        assert "Traceback" not in done.stderr
        assert "no room could be set aside for 32 answers" in done.stderr
        assert not spare._path(config.workdir / "ledger.sqlite").exists()
        assert command(config).returncode == 0


@pytest.fixture
def small_disk(tmp_path: Path):
    """A file system of 6 MB, of which 5.5 are free."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if not shutil.which("mount") or os.geteuid() != 0:
        pytest.skip("mounting a small file system needs root")
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=6m", "tmpfs", folder], capture_output=True, text=True)
    if made.returncode:
        pytest.skip(f"a small file system could not be mounted: {made.stderr.strip()}")
    yield folder
    subprocess.run(["umount", folder], check=True)


@pytest.mark.parametrize("workers", [1, 2])
def test_answers_under_way_are_kept_when_the_disk_is_full(workers: int, small_disk: Path, tmp_path: Path):
    log = tmp_path / "log.jsonl"
    with running_teacher(TeacherOptions(log=log, latency_s=0.05)) as base_url:
        config = config_for(tmp_path, base_url, count=400)
        config = dataclasses.replace(config, workdir=small_disk / "run", workers=workers)
        done = command(config)
        assert done.returncode == 1, done.stderr
        assert "Traceback" not in done.stderr
        assert "the disk is full: free space at" in done.stderr
        with sqlite3.connect(config.workdir / "ledger.sqlite") as database:
            (kept,) = database.execute("SELECT count(*) FROM responses").fetchone()
        database.close()
        assert 0 < kept == sum(answered(log).values()) < 400
        subprocess.run(["mount", "-o", "remount,size=60m", small_disk], check=True)
        assert main(config)["verified"] == 400
    assert set(answered(log).values()) == {1}


def test_a_disk_without_room_to_set_aside_is_told_before_anything_is_asked(small_disk: Path, tmp_path: Path):
    log = tmp_path / "log.jsonl"
    with running_teacher(TeacherOptions(log=log)) as base_url:
        config = dataclasses.replace(config_for(tmp_path, base_url, max_tokens=32_768), workdir=small_disk / "run")
        done = command(config)
    assert done.returncode == 1
    assert "the disk is full" in done.stderr
    assert not log.read_text()
