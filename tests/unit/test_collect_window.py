"""Calls are planned as others are answered: what is in memory does not grow with the file, and nothing else changes."""

import dataclasses
import json
import sqlite3
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from test_collect_limits import config_for, log_entries, manifest_of

from jaxdistill.collect import campaign
from jaxdistill.collect.config import LEDGER
from jaxdistill.collect.run import main
from jaxdistill.errors import RunError
from jaxdistill.local_teacher.answers import Faults
from jaxdistill.local_teacher.app import TeacherOptions
from jaxdistill.local_teacher.problems import generate
from jaxdistill.local_teacher.server import running_teacher
from jaxdistill.records import Chain, Example, Problem, read_jsonl, write_jsonl


@pytest.fixture
def narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    """Four calls wait at a time for each that may be under way."""
    monkeypatch.setattr(campaign, "_WINDOW_BYTES", 8)
    monkeypatch.setattr(campaign, "_PLANNED", 3)


def rows_of(folder: Path) -> dict[str, Any]:
    """What a run wrote, without what differs from run to run."""
    chains = [json.loads(line) for line in (folder / "chains.jsonl").read_text().splitlines()]
    told = [{name: one[name] for name in ("id", "messages", "verdict", "usage", "prompt_hash")} for one in chains]
    return {"chains": told, **{name: (folder / name).read_text() for name in ("dropped.jsonl", "pass_rates.jsonl")}}


@pytest.mark.parametrize("changes", [{"samples_per_problem": 3, "until_verified": 1}, {"method": "journey"}])
def test_a_window_changes_nothing_that_is_written(changes: dict[str, Any], tmp_path: Path, request: Any):
    written = []
    for name in ("wide", "narrow"):
        folder = tmp_path / name
        folder.mkdir()
        if name == "narrow":
            request.getfixturevalue("narrow")
        log = folder / "log.jsonl"
        faults = Faults(wrong=0.3, truncated=0.1, server_error=0.05)
        with running_teacher(TeacherOptions(log=log, faults=faults, seed=2)) as base_url:
            config = dataclasses.replace(config_for(folder, base_url, 40, in_flight=2, max_tokens=2000), **changes)
            main(config)
            asked = len(log_entries(log))
            main(config)  # all of it is there: nothing is asked, whatever the window
            assert len(log_entries(log)) == asked
        written.append(rows_of(config.workdir))
    assert written[0] == written[1]
    assert len(written[0]["chains"]) > 20
    ids = [one["id"].partition("/")[0] for one in written[0]["chains"]]
    order = [problem.id for problem in generate("all", 40, seed=1, split="train")]
    assert ids == sorted(ids, key=order.index)


@pytest.mark.usefixtures("narrow")
def test_calls_are_recorded_as_others_are_answered(tmp_path: Path):
    with running_teacher() as base_url:
        config = config_for(tmp_path, base_url, 60, in_flight=2)
        assert main(config)["verified"] == 60
    database = sqlite3.connect(config.workdir / LEDGER)
    last, first = database.execute(
        "SELECT max(recorded), min(received) FROM requests JOIN responses USING (key)"
    ).fetchone()
    assert last > first
    recorded = [when for (when,) in database.execute("SELECT recorded FROM requests ORDER BY id")]
    received = sorted(when for (when,) in database.execute("SELECT received FROM responses"))
    database.close()
    waiting = [place + 1 - sum(answer < when for answer in received) for place, when in enumerate(recorded)]
    assert max(waiting) <= 2 * 4 + 3 + 4  # and those that were answered and not yet seen


@pytest.mark.usefixtures("narrow")
def test_what_was_answered_before_is_a_result_where_the_budget_ends_before_it(tmp_path: Path):
    with running_teacher() as base_url:
        config = config_for(tmp_path, base_url, 60, in_flight=2)
        problems = generate("all", 60, seed=1, split="train")
        write_jsonl(config.problems, problems[40:])
        assert main(config)["verified"] == 20
        write_jsonl(config.problems, problems)
        spent = manifest_of(config)["spent_tokens"]
        with pytest.raises(RunError, match="the budget leaves no room"):
            main(dataclasses.replace(config, budget_tokens=spent + 5000))
        chains = [one.problem_id for one in read_jsonl(config.workdir / "chains.jsonl", Chain)]
        assert chains[-20:] == [problem.id for problem in problems[40:]]
        assert 20 < len(chains) < 40
        assert main(config)["verified"] == 60


def test_a_file_that_changes_meanwhile_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    with running_teacher() as base_url:
        config = config_for(tmp_path, base_url, 5)
        run = campaign.Campaign.run

        def changing(*words: Any) -> Any:
            account = run(*words)
            write_jsonl(config.problems, generate("all", 6, seed=1, split="train"))
            return account

        monkeypatch.setattr(campaign.Campaign, "run", changing)
        with pytest.raises(RunError, match=r"problems\.jsonl changed while it was worked on"):
            main(config)


PROGRAM = """
import sys
from pathlib import Path
from jaxdistill import cli
from jaxdistill.collect import campaign, viewer
campaign._WINDOW_BYTES, viewer._MOST_PROBLEMS = 1 << 20, 5
try:
    cli.main(sys.argv[1:])
except SystemExit as ended:
    assert ended.code == 1  # the local teacher knows none of these: nothing was kept
(line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
print(line.split()[1])  # kB; getrusage would count what the process that started this one had
"""


@pytest.mark.parametrize(("stage", "option"), [("collect", "--problems"), ("refine translate", "--examples")])
def test_memory_does_not_grow_with_the_texts(stage: str, option: str, tmp_path: Path):
    """Five times the rows: less than half of the bytes that are read more."""
    peaks, sizes = [], []
    with running_teacher() as base_url:
        for count in (60, 300):
            path, text = tmp_path / f"{count}.jsonl", "step by step " * 4000
            problems = [Problem(id=f"p{i}", problem=f"{i} {text}", answer="1") for i in range(count)]
            asked = [Example(id=p.id, messages=({"role": "user", "content": p.problem},)) for p in problems]
            write_jsonl(path, problems if stage == "collect" else asked)
            words = [*stage.split(), option, str(path), "--workdir", str(tmp_path / f"run{count}")]
            words += ["--teacher.base-url", base_url, "--teacher.in-flight", "4"]
            command = [sys.executable, "-c", PROGRAM, *words]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            peaks.append(int(done.stdout) * 1024)
            sizes.append(path.stat().st_size)
    assert (peaks[1] - peaks[0]) / (sizes[1] - sizes[0]) < 0.5, peaks
