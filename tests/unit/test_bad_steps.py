"""Bad steps: which they are, what becomes of the weights, and what is said of them."""

import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from jaxdistill import optim
from jaxdistill.errors import UserError
from jaxdistill.models import decoder
from jaxdistill.train import step as train_step
from jaxdistill.train.bad_steps import BadStepError, BadStepsConfig, Guard, is_good, usual_norm


def good(config: BadStepsConfig, loss: float, norm: float, usual: float | None, step: int) -> bool:
    numbers = jnp.float32(loss), jnp.float32(norm), None if usual is None else jnp.float32(usual)
    return bool(is_good(config, *numbers, jnp.int32(step)))


def test_what_is_no_number_is_bad_and_so_is_a_spike_where_it_is_looked_for():
    plain, spikes = BadStepsConfig(), BadStepsConfig(spike=5.0)
    assert good(plain, 1.0, 1e9, None, 100)
    assert not good(plain, float("nan"), 1.0, None, 0)
    assert not good(plain, 1.0, float("inf"), None, 0)
    assert good(spikes, 1.0, 4.9, 1.0, 100)
    assert not good(spikes, 1.0, 5.1, 1.0, 100)
    assert good(spikes, 1.0, 50.0, 1.0, 3), "the first steps are only learned from"
    assert not good(spikes, 1.0, float("nan"), 1.0, 3)


def test_the_usual_norm_is_a_mean_and_forgets():
    usual = jnp.float32(0)
    for step, norm in enumerate([4.0, 2.0, 3.0]):
        usual = usual_norm(usual, jnp.float32(norm), jnp.bool(True), jnp.int32(step))
    assert float(usual) == pytest.approx(3.0)
    assert float(usual_norm(usual, jnp.float32("nan"), jnp.bool(False), jnp.int32(3))) == float(usual)
    for step in range(3, 200):
        usual = usual_norm(usual, jnp.float32(10.0), jnp.bool(True), jnp.int32(step))
    assert float(usual) == pytest.approx(10.0, rel=1e-3)


@pytest.mark.parametrize("policy", ["skip", "stop"])
def test_a_spike_leaves_weights_and_moments_as_they_were_where_it_is_skipped(policy: str):
    c, bad = tiny.config("qwen2"), BadStepsConfig(policy=policy, spike=2.0)  # type: ignore[arg-type]
    optimizer = optim.make(optim.OptimConfig(peak_lr=1e-2), 100, decoder.template(c))
    how = train_step.StepConfig(compute_dtype="float32")
    with tiny.mesh():
        state = train_step.new_state(tiny.put(tiny.values(c), c), optimizer, 0, spikes=True)
        usual = state.usual_norm + 1e-6
        state = dataclasses.replace(state, step=state.step + 50, usual_norm=usual)
        before = jax.tree.map(np.asarray, (state.params, state.opt_state))
        step = train_step.make_step(how, train_step.REFERENCE, c, optimizer, 0.0, None, bad)
        state, values = step(state, train_step.place(tiny.packed([7, 9], c.vocab, 1, 16), 1))
        after = jax.tree.map(np.asarray, (state.params, state.opt_state))
        assert not values["good"]
        assert float(state.usual_norm) == float(values["usual_norm"]) == pytest.approx(1e-6)
        assert int(state.step) == 51
    floats = [(a, b) for a, b in zip(*map(jax.tree.leaves, (before, after)), strict=True) if a.dtype == np.float32]
    assert floats
    assert all(np.array_equal(a, b) for a, b in floats) == (policy == "skip")


def test_the_guard_writes_each_down_and_ends_a_series(tmp_path: Path):
    guard = Guard(BadStepsConfig(policy="skip", spike=3.0, in_a_row=2), "sft", tmp_path)
    sound, spike = {"loss": 1.0, "grad_norm": 1.0, "good": 1.0}, {"loss": 1.0, "grad_norm": 9.0, "good": 0.0}
    assert guard.look(1, sound, 0.1, ["a"]) == ""
    assert "its batch is skipped" in guard.look(2, spike, 0.1, ["b"])
    assert guard.look(3, sound, 0.1, ["c"]) == "", "the series ends"
    guard.look(4, spike, 0.1, ["d"])
    guard.look(5, {**sound, "grad_norm": float("nan"), "good": 0.0}, 0.1, ["e"])
    with pytest.raises(BadStepError, match=r"step 6 of sft: .*so were the 2 before; the batch held f.*--replay sft:6"):
        guard.look(6, spike, 0.1, ["f"])
    rows = [json.loads(line) for line in (tmp_path / "bad_steps.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [(row["step"], row["action"], row["documents"]) for row in rows] == [
        (2, "skipped", ["b"]),
        (4, "skipped", ["d"]),
        (5, "skipped", ["e"]),
        (6, "stopped", ["f"]),
    ]
    assert rows[2]["grad_norm"] == "nan"


@pytest.mark.parametrize("wrong", [{"spike": 1.0}, {"in_a_row": 0}])
def test_what_makes_no_sense_is_refused(wrong: dict[str, float]):
    with pytest.raises(UserError, match="expected a spike above 1"):
        BadStepsConfig(**wrong)  # type: ignore[arg-type]
