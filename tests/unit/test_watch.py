"""What a run shows of itself while it works: heartbeats, stacks of a silent host, a profile of some steps."""

import json
import time
from pathlib import Path

import jax.numpy as jnp
import pytest

from jaxdistill.errors import UserError
from jaxdistill.train import profiling, watch


def test_a_silent_host_writes_where_its_threads_hang(tmp_path: Path):
    with watch.Watch(tmp_path, silence_s=0.2, tell=print) as watched:
        watched.beat("sft", 3)
        time.sleep(0.5)
        stacks = (tmp_path / "hosts" / "0.stacks").read_text(encoding="utf-8")
    assert "test_a_silent_host" in stacks
    facts = json.loads((tmp_path / "hosts" / "0.json").read_text(encoding="utf-8"))
    assert (facts["phase"], facts["step"], facts["ended"]) == ("sft", 3, True)


def test_the_steps_asked_for_are_traced(tmp_path: Path):
    with profiling.profile(tmp_path, "2:3") as profile:
        assert [profile.starts_at(step) for step in (1, 2, 3, 4)] == [False, True, True, False]
        profile.start()
        jnp.ones(3).sum().block_until_ready()
        assert [profile.ends_at(step) for step in (2, 3)] == [False, True]
    assert list(tmp_path.rglob("*.xplane.pb"))


@pytest.mark.parametrize("wrong", ["3", "0:2", "5:4", "a:b"])
def test_steps_that_make_no_span(wrong: str):
    with pytest.raises(UserError, match="expected the first and the last step as a:b"):
        profiling.span(wrong)
