"""Goodput: every second of a run goes to one kind, over restarts too."""

import time
from pathlib import Path

import pytest

from jaxdistill.train import goodput
from jaxdistill.train.goodput import Goodput


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time, in a list so that a test can move it."""
    now = [1000.0]
    monkeypatch.setattr(time, "time", lambda: now[0])
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    return now


def test_a_run_that_was_killed_and_started_again(tmp_path: Path, clock: list[float]):
    first = Goodput(tmp_path, launched=990.0)  # 10 s ago
    clock[0] += 5
    first.begin("sft", 0)
    with first.on("compile"):
        clock[0] += 20
    first.turn_to("steps")
    clock[0] += 30
    assert first.first_step() == 65.0
    assert first.first_step() is None
    with first.on("checkpoint"):
        clock[0] += 2
    first.saved(10)
    clock[0] += 40  # steps that no checkpoint will hold
    first.turn_to("steps")
    clock[0] += 4
    # and here it is killed: its last word is from 4 s ago

    clock[0] += 96
    second = Goodput(tmp_path, launched=clock[0] - 3)
    second.begin("sft", 10)
    second.turn_to("steps")
    clock[0] += 35
    second.wasted("input", 5.0)
    with second.on("evaluation"):
        clock[0] += 7
    second.close()
    facts = goodput.read(tmp_path)
    assert facts["starts"] == 2
    assert facts["productive"] == {"sft": 60.0}
    assert facts["seconds"] == {
        "start-up": 18.0,
        "compile": 20.0,
        "input": 5.0,
        "checkpoint": 2.0,
        "evaluation": 7.0,
        "restart": 97.0,
        "lost": 40.0,
    }
    assert sum(facts["seconds"].values()) + 60.0 == clock[0] - 990.0, "no second is left out or counted twice"
    words = goodput.in_words(facts)
    assert words.startswith("24.1% of 249 s over 2 starts were steps; start-up 7.2%, compile 8.0%")


def test_phases_lose_their_own_steps(tmp_path: Path, clock: list[float]):
    run = Goodput(tmp_path, launched=1000.0)
    for phase, seconds in (("one", 10.0), ("two", 20.0)):
        run.begin(phase, 0)
        run.turn_to("steps")
        clock[0] += seconds
    run.close()
    again = Goodput(tmp_path, launched=clock[0])
    again.begin("two", 0)
    assert again.facts()["productive"] == {"one": 10.0, "two": 0.0}
    assert again.facts()["seconds"]["lost"] == 20.0


def test_only_one_of_several_processes_writes(tmp_path: Path):
    Goodput(tmp_path, launched=time.time(), writes=False).close()
    assert goodput.read(tmp_path) == {}
