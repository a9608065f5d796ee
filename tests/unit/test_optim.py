"""The learning rate by step, what decays, and clipping."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from jaxdistill import optim, weights
from jaxdistill.errors import UserError
from jaxdistill.models import decoder
from jaxdistill.optim import OptimConfig


def test_schedule_warms_up_and_decays_to_its_end():
    c = OptimConfig(peak_lr=1e-3, end_lr_fraction=0.1, warmup_fraction=0.1)
    rates = np.array([float(optim.schedule(c, 100)(step)) for step in range(101)])
    assert rates[0] == pytest.approx(1e-4), "the first step already moves"
    assert rates[:11] == pytest.approx(np.linspace(1e-4, 1e-3, 11))
    assert rates.argmax() == 10
    assert (np.diff(rates[10:]) < 0).all()
    assert rates[55] == pytest.approx((1e-3 + 1e-4) / 2)
    assert rates[100] == pytest.approx(1e-4)


def test_wsd_warms_up_stays_and_falls_in_a_line():
    c = OptimConfig(peak_lr=1e-3, end_lr_fraction=0.1, warmup_fraction=0.1, schedule="wsd", decay_fraction=0.2)
    rates = np.array([float(optim.schedule(c, 100)(step)) for step in range(101)])
    assert rates[:11] == pytest.approx(np.linspace(1e-4, 1e-3, 11))
    assert rates[10:81] == pytest.approx(np.full(71, 1e-3))
    assert rates[80:] == pytest.approx(np.linspace(1e-3, 1e-4, 21))


def test_constant_stays_after_the_warm_up():
    c = OptimConfig(peak_lr=1e-3, warmup_fraction=0.1, schedule="constant")
    rates = np.array([float(optim.schedule(c, 100)(step)) for step in range(101)])
    assert rates[:11] == pytest.approx(np.linspace(1e-4, 1e-3, 11))
    assert rates[10:] == pytest.approx(np.full(91, 1e-3))


@pytest.mark.parametrize("kind", ["cosine", "wsd", "constant"])
@pytest.mark.parametrize("warmup", [0.0, 0.03, 1.0])
@pytest.mark.parametrize("steps", [1, 2, 7])
def test_schedule_of_few_steps_is_positive(steps: int, warmup: float, kind: Any):
    c = OptimConfig(warmup_fraction=warmup, decay_fraction=0.0 if warmup == 1 else 0.5, schedule=kind)
    rates = [float(optim.schedule(c, steps)(i)) for i in range(steps)]
    assert all(0 < rate <= 1e-5 * (1 + 1e-6) for rate in rates)


OPTIMIZERS = ["adamw", "muon", "lion", "adafactor"]
FACTORED = {"hidden_size": 128, "intermediate_size": 256}  # from 128 on, Adafactor keeps rows and columns


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_matrices_decay_and_norms_and_biases_do_not(name: Any):
    c = tiny.config("qwen2")
    host = tiny.values(c)
    settings = OptimConfig(
        optimizer=name,
        peak_lr=0.1,
        weight_decay=0.5,
        warmup_fraction=0.0,
        no_decay=("model.embed_tokens.*", "model.layers.*.mlp.down_proj.weight"),
    )
    optimizer = optim.make(settings, 10, decoder.template(c))
    zero = jax.tree.map(np.zeros_like, host)
    updates, _ = optimizer.update(zero, optimizer.init(host), host)
    for (path, update), weight in zip(jax.tree_util.tree_leaves_with_path(updates), jax.tree.leaves(host), strict=True):
        name = jax.tree_util.keystr(path)
        decays = not ("norm" in name or ".b_" in name or name in (".embed", ".blocks.w_down"))
        np.testing.assert_allclose(update, -0.1 * 0.5 * weight if decays else 0 * weight, rtol=1e-5, err_msg=name)


def test_gradients_are_clipped_by_their_global_norm():
    c = tiny.config("llama")
    host = tiny.values(c)
    optimizer = optim.make(OptimConfig(clip_norm=1.0, eps=1.0), 10, decoder.template(c))
    small = jax.tree.map(lambda w: w / np.sqrt(sum((v**2).sum() for v in jax.tree.leaves(host))), host)
    once, _ = optimizer.update(small, optimizer.init(host), host)
    many, _ = optimizer.update(jax.tree.map(lambda g: 50 * g, small), optimizer.init(host), host)
    tiny.assert_trees_close(many, once, 1e-5)


def test_moments_are_float32():
    c = tiny.config("llama")
    state = optim.make(OptimConfig(), 10, decoder.template(c)).init(tiny.values(c))
    assert {leaf.dtype for leaf in jax.tree.leaves(state) if jnp.ndim(leaf)} == {jnp.dtype(jnp.float32)}


def updates_of(name: Any, mesh: dict[str, int], steps: int = 3, **sizes: int) -> Any:
    """The last update of some steps with random gradients, on the host."""
    c = tiny.config("qwen2", **sizes)
    optimizer = optim.make(OptimConfig(optimizer=name, peak_lr=0.1, clip_norm=1e9), 10, decoder.template(c))
    with tiny.mesh(**mesh):
        params = tiny.put(tiny.values(c), c)
        state, updates = jax.jit(optimizer.init)(params), params
        for seed in range(steps):
            grads = tiny.put(tiny.values(c, seed), c)
            updates, state = jax.jit(optimizer.update)(grads, state, params)
            layouts = jax.tree.map(lambda update, weight: update.sharding == weight.sharding, updates, params)
            assert all(jax.tree.leaves(layouts)), layouts
        return jax.tree.map(np.asarray, updates)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_is_the_same_on_a_mesh(name: Any):
    sizes = FACTORED if name == "adafactor" else {}
    alone, sharded = updates_of(name, {}, **sizes), updates_of(name, {"fsdp": 4, "tensor": 2}, **sizes)
    tiny.assert_trees_close(sharded, alone, 1e-5)


def test_muon_makes_matrices_orthogonal_and_leaves_the_rest_to_adam():
    found, adam = updates_of("muon", {}, steps=1), updates_of("adamw", {}, steps=1)
    rate = 0.1  # of the first step
    w_q, w_o = found.blocks.w_q[1], found.blocks.w_o[1]
    for matrix in (w_q.reshape(len(w_q), -1), w_o.reshape(-1, w_o.shape[-1]), found.blocks.w_down[0]):
        singular = np.linalg.svd(matrix / (rate * 0.2 * max(matrix.shape) ** 0.5), compute_uv=False)
        assert 0.3 < singular.min() < singular.max() < 1.3, "Newton-Schulz brings them near 1, not to it"
    for name in ("embed", "final_norm"):
        np.testing.assert_array_equal(getattr(found, name), getattr(adam, name))
    np.testing.assert_array_equal(found.blocks.b_q, adam.blocks.b_q)


def test_lion_moves_every_weight_by_the_learning_rate():
    for update in jax.tree.leaves(updates_of("lion", {})):
        np.testing.assert_allclose(np.abs(update[update != 0]), 0.1, rtol=0.1)


def test_adafactor_keeps_rows_and_columns_of_large_matrices():
    c = tiny.config("llama", **FACTORED)
    state = optim.make(OptimConfig(optimizer="adafactor"), 10, decoder.template(c)).init(tiny.values(c))
    kept = sum(leaf.size for leaf in jax.tree.leaves(state))
    assert kept < 0.6 * weights.count(decoder.template(c))


def test_a_pattern_that_names_no_weight_is_refused():
    c = OptimConfig(no_decay=("model.embed*", "lm_haed.weight"))
    with pytest.raises(UserError, match=r"optim.no_decay: lm_haed.weight names no weight; the weights are model"):
        optim.make(c, 10, decoder.template(tiny.config("llama")))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"peak_lr": 0.0}, "optim.peak_lr is 0.0"),
        ({"warmup_fraction": 1.5}, "optim.warmup_fraction is 1.5; expected 0 to 1"),
        ({"schedule": "wsd", "warmup_fraction": 0.9}, "warmup_fraction 0.9 and optim.decay_fraction 0.2 overlap"),
        ({"b2": 1.0}, "optim.b2 is 1.0; expected 0 to less than 1"),
        ({"clip_norm": 0.0}, "optim.clip_norm is 0.0; expected a positive number"),
        ({"eps": 0.0}, "optim.eps is 0.0; expected a positive number"),
        ({"weight_decay": -0.1}, "optim.weight_decay is -0.1; expected 0 .none. or more"),
    ],
)
def test_settings_that_make_no_sense(settings: dict[str, Any], message: str):
    with pytest.raises(UserError, match=message):
        OptimConfig(**settings)
