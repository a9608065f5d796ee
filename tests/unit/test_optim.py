"""The learning rate by step, what decays, and clipping."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from jaxdistill import optim
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


@pytest.mark.parametrize("warmup", [0.0, 0.03, 1.0])
@pytest.mark.parametrize("steps", [1, 2, 7])
def test_schedule_of_few_steps_is_positive(steps: int, warmup: float):
    rates = [float(optim.schedule(OptimConfig(warmup_fraction=warmup), steps)(i)) for i in range(steps)]
    assert all(0 < rate <= 1e-5 * (1 + 1e-6) for rate in rates)


def test_matrices_decay_and_norms_and_biases_do_not():
    c = tiny.config("qwen2")
    host = tiny.values(c)
    optimizer = optim.make(OptimConfig(peak_lr=0.1, weight_decay=0.5, warmup_fraction=0.0), 10, decoder.template(c))
    zero = jax.tree.map(np.zeros_like, host)
    updates, _ = optimizer.update(zero, optimizer.init(host), host)
    for (path, update), weight in zip(jax.tree_util.tree_leaves_with_path(updates), jax.tree.leaves(host), strict=True):
        name = jax.tree_util.keystr(path)
        decays = not ("norm" in name or ".b_" in name)
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


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"peak_lr": 0.0}, "optim.peak_lr is 0.0"),
        ({"warmup_fraction": 1.5}, "optim.warmup_fraction is 1.5; expected 0 to 1"),
        ({"clip_norm": 0.0}, "optim.clip_norm is 0.0; expected a positive number"),
    ],
)
def test_settings_that_make_no_sense(settings: dict[str, float], message: str):
    with pytest.raises(UserError, match=message):
        OptimConfig(**settings)
