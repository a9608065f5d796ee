"""SIGKILL while collecting: every finished answer is kept, none is asked for again, and the teacher's log proves it."""

import collections
import contextlib
import json
import os
import random
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import pytest
from rows import log_entries

from jaxdistill.collect.run import CollectConfig, main
from jaxdistill.collect.teacher import TeacherConfig
from jaxdistill.local_teacher.answers import Faults, body_hash
from jaxdistill.local_teacher.app import TeacherOptions
from jaxdistill.local_teacher.problems import generate
from jaxdistill.local_teacher.server import running_teacher
from jaxdistill.records import write_jsonl

FAULTS = Faults(rate_limited=0.02, server_error=0.02, truncated=0.05, wrong=0.1)
PROGRAM = """
from pathlib import Path, PosixPath
from jaxdistill.collect.run import CollectConfig, main
from jaxdistill.collect.teacher import TeacherConfig
main({config!r})
"""


def finished(ledger: Path) -> dict[str, bytes]:
    """Hash of the body -> raw answer, for every answer that is on the disk."""
    if not ledger.exists():
        return {}
    with contextlib.closing(sqlite3.connect(ledger, timeout=60)) as database:
        try:
            rows = database.execute("SELECT body, raw FROM requests JOIN responses USING (key)").fetchall()
        except sqlite3.OperationalError:  # killed before the tables were there
            return {}
    return {body_hash(json.loads(body)): raw for body, raw in rows}


@pytest.mark.soak
def test_killed_at_random_moments_nothing_finished_is_lost_or_asked_again(tmp_path: Path, full_size: bool):
    """2,000 requests, 32 in flight, 20 kills at full size; 240 and 4 kills shortened. The ledger is shared by two
    processes in the shortened run's second half and in every second start of the long one."""
    requests, kills = (2000, 20) if full_size else (240, 4)
    rng = random.Random(3)
    log, in_flight = tmp_path / "log.jsonl", 32
    write_jsonl(tmp_path / "problems.jsonl", generate("all", requests, seed=2, split="train"))
    options = TeacherOptions(faults=FAULTS, latency_s=0.05, retry_after_s=0, log=log)
    with running_teacher(options) as base_url:
        teacher = TeacherConfig(base_url=base_url, profile="local", max_tokens=400, backoff_s=0.05, in_flight=in_flight)

        def config(start: int) -> CollectConfig:
            return CollectConfig(
                problems=tmp_path / "problems.jsonl",
                workdir=tmp_path / "run",
                teacher=teacher,
                workers=1 + start % 2,
            )

        ledger = tmp_path / "run" / "ledger.sqlite"
        kept: dict[str, bytes] = {}
        marks: list[tuple[int, set[str]]] = []  # lines of the log, and what was finished, at each kill
        for kill in range(kills):
            process = subprocess.Popen(
                [sys.executable, "-c", PROGRAM.format(config=config(kill))],
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )
            wanted = len(log_entries(log)) + max(1, round(rng.uniform(0.2, 1.0) * requests / (kills + 1)))
            deadline = time.monotonic() + 120
            while len(log_entries(log)) < wanted and process.poll() is None:
                assert time.monotonic() < deadline
                time.sleep(0.005)
            time.sleep(rng.uniform(0.0, 0.05))
            os.kill(process.pid, signal.SIGKILL)
            assert process.wait() == -signal.SIGKILL, "it was finished before it could be killed"
            wait_for_workers(ledger)
            now = finished(ledger)
            assert kept.items() <= now.items(), "an answer that was on the disk is gone or has changed"
            kept = now
            marks.append((len(log_entries(log)), set(kept)))
        assert 0 < len(kept) < requests
        counts = main(config(0))
        assert sum(counts.values()) == requests
        assert counts["failed"] == 0
    after = finished(ledger)
    assert len(after) == requests
    assert kept.items() <= after.items()
    entries = log_entries(log)
    for lines, names in marks:
        assert not {entry["body_sha256"] for entry in entries[lines:]} & names, "a finished request was asked again"
    # Over all runs the only answers made twice are those under way at a kill.
    answered = collections.Counter(entry["body_sha256"] for entry in entries if entry["status"] == 200)
    assert set(answered) == set(after)
    assert sum(answered.values()) - requests <= kills * in_flight * 2


def wait_for_workers(ledger: Path) -> None:
    """Until the killed command's workers have gone too: they hold the ledger, and what they sent reaches the log."""
    import fcntl

    deadline = time.monotonic() + 30
    path = ledger.with_name(ledger.name + ".lock")
    while path.exists():
        with path.open("a") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                assert time.monotonic() < deadline
        time.sleep(0.01)
    time.sleep(0.3)
