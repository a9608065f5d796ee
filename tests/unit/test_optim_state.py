"""Weights and moments in bfloat16, moments in the host's memory: what an update leaves where, and that it learns."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from jaxdistill import optim, optim_state
from jaxdistill.errors import UserError
from jaxdistill.models import decoder
from jaxdistill.models.attention import REFERENCE
from jaxdistill.optim import OptimConfig
from jaxdistill.train import step as train_step
from jaxdistill.train.step import StepConfig

C = tiny.config("qwen2", num_hidden_layers=1)
OPTIMIZERS = ["adamw", "muon", "lion", "adafactor"]


@pytest.fixture(autouse=True, scope="module")
def _compiled_in_a_hurry():
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


def alike(x: jax.Array, like: jax.ShapeDtypeStruct) -> bool:
    same_place = x.sharding.is_equivalent_to(like.sharding, x.ndim)
    return (x.shape, x.dtype, same_place) == (like.shape, like.dtype, True)


def updated(name: Any, dtype: Any, mesh: dict[str, int], on_host: bool = False) -> tuple[Any, Any]:
    """Weights and state after two updates with random gradients, as arrays."""
    optimizer = optim.make(OptimConfig(optimizer=name, peak_lr=1e-3), 2, decoder.template(C))

    @jax.jit
    def update(grads: Any, state: Any, params: Any, key: Any) -> tuple[Any, Any]:
        return optim_state.apply(optimizer, grads, state, params, key)

    with tiny.mesh(**mesh):
        params = jax.tree.map(lambda w: w.astype(dtype), tiny.put(tiny.values(C), C))
        state = optim_state.init(optimizer, params, on_host)
        before = optim_state.abstract(optimizer, params, on_host)
        assert all(jax.tree.leaves(jax.tree.map(alike, state, before)))
        for seed in (1, 2):
            params, state = update(tiny.put(tiny.values(C, seed), C), state, params, jax.random.key(seed))
        assert all(jax.tree.leaves(jax.tree.map(alike, state, before)))
        assert {w.dtype for w in jax.tree.leaves(params)} == {jnp.dtype(dtype)}
    return params, state


@pytest.mark.parametrize(("name", "dtype"), [*((name, "float32") for name in OPTIMIZERS), ("adamw", "bfloat16")])
def test_state_on_the_host_is_the_same_state(name: Any, dtype: str):
    mesh = {"fsdp": 2, "tensor": 2}
    here, there = updated(name, dtype, mesh), updated(name, dtype, mesh, on_host=True)
    memories = {(x.ndim > 0, x.sharding.memory_kind) for x in jax.tree.leaves(there[1])}
    assert memories == {(True, "pinned_host"), (False, "device")}
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(there), jax.device_get(here))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_weights_and_moments_in_bfloat16_stay_near_those_in_float32(name: Any):
    (params, state), (wide, wide_state) = updated(name, "bfloat16", {}), updated(name, "float32", {})
    kept = sum(x.nbytes for x in jax.tree.leaves(state)) / sum(x.nbytes for x in jax.tree.leaves(wide_state))
    assert kept == pytest.approx(0.5, abs=0.01)
    for found, expected in zip(jax.tree.leaves(params), jax.tree.leaves(wide), strict=True):
        largest_step = 2.0**-7 * np.abs(expected).max()
        assert np.abs(found.astype(np.float32) - expected).max() < 4 * largest_step  # first values, then two updates


def test_rounding_does_not_depend_on_the_mesh():
    alone, sharded = updated("lion", "bfloat16", {}), updated("lion", "bfloat16", {"fsdp": 4, "tensor": 2})
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(sharded), jax.device_get(alone))


def test_a_learning_rate_below_the_precision_of_the_weights_still_moves_them():
    """Lion moves each weight by the rate: 1/10,000 of a weight of 1, where bfloat16 goes down in steps of 1/256."""
    c = OptimConfig(optimizer="lion", peak_lr=1e-4, schedule="constant", warmup_fraction=0.0, clip_norm=1e9)
    optimizer = optim.make(c, 200, decoder.template(C))
    ones = jax.tree.map(np.ones_like, tiny.values(C))
    params = jax.tree.map(lambda w: jnp.asarray(w, jnp.bfloat16), ones)

    def step(carry: Any, key: Any) -> tuple[Any, None]:
        params, state = carry
        return optim_state.apply(optimizer, ones, state, params, key), None

    run = jax.jit(lambda start, keys: jax.lax.scan(step, start, keys)[0][0])
    moved = run((params, optim_state.init(optimizer, params)), jax.random.split(jax.random.key(0), 200))
    for w in jax.tree.leaves(moved):
        if w.size > 1000:
            assert np.asarray(w, np.float32).mean() == pytest.approx(0.98, abs=1e-3)


def losses(state_dtype: Any, accumulate: int = 1, steps: int = 30) -> list[float]:
    """Of steps on the same rows."""
    settings = OptimConfig(peak_lr=3e-3, state_dtype=state_dtype)
    with tiny.mesh(fsdp=2):
        optimizer = optim.make(settings, steps, decoder.template(C))
        params = jax.tree.map(lambda w: w.astype(state_dtype), tiny.put(tiny.values(C), C))
        state = train_step.new_state(params, optimizer, seed=1, average=True)
        config = StepConfig(compute_dtype="float32", accumulate=accumulate)
        step = train_step.make_step(config, REFERENCE, C, optimizer, 0.9)
        batch = train_step.place(tiny.packed([61, 33, 29, 17, 40, 60], C.vocab, 4, 64), accumulate)
        found = []
        for _ in range(steps):
            state, values = step(state, batch)
            found.append(float(values["loss"]))
            assert values["grad_norm"].dtype == jnp.float32
        assert {w.dtype for w in jax.tree.leaves(state.params)} == {jnp.dtype(state_dtype)}
        assert {w.dtype for w in jax.tree.leaves(state.average)} == {jnp.dtype(jnp.float32)}
        near = jax.tree.map(lambda a, w: jnp.abs(a - w).max() / jnp.abs(a).max(), state.average, state.params)
        assert all(difference < 0.2 for difference in jax.tree.leaves(near))
    return found


def test_training_in_bfloat16_learns_as_in_float32():
    """Whatever the accumulation, which is in float32."""
    wide = losses("float32")
    assert wide[-1] < 0.6 * wide[0]
    for accumulate in (1, 2):
        np.testing.assert_allclose(losses("bfloat16", accumulate), wide, rtol=0.01)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"offload_moments": True}, r"^step.offload_moments: .* pinned_host was expected, but .* reach device; keep"),
        ({"remat": "offload"}, r"^step.remat offload: the host's memory"),
        ({"offload_moments": True, "remat": "offload"}, r"^step.offload_moments and step.remat offload: "),
    ],
)
def test_devices_that_do_not_reach_the_hosts_memory(settings: dict[str, Any], message: str):
    with pytest.raises(UserError, match=message):
        train_step.check_memory(StepConfig(**settings), {"device"})
    train_step.check_memory(StepConfig(**settings), {"device", "pinned_host"})
    train_step.check_memory(
        dataclasses.replace(StepConfig(**settings), offload_moments=False, remat="full"), {"device"}
    )
