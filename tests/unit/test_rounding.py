"""Stochastic rounding: exact where bfloat16 is, right on average elsewhere, and the same on every mesh."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import tiny

from jaxdistill import rounding

COUNT = 1 << 16


def rounded(x: np.ndarray, seed: int = 0) -> np.ndarray:
    return np.asarray(jax.jit(rounding.stochastic)(x, jax.random.key(seed)), np.float32)


def test_what_bfloat16_holds_is_kept():
    every = np.arange(1 << 16, dtype=np.uint16).view(ml_dtypes.bfloat16).astype(np.float32)
    every = every[(every == 0) | (np.abs(every) > np.finfo(np.float32).tiny) | np.isnan(every)]  # CPUs flush the others
    np.testing.assert_array_equal(rounded(every), every)
    quiet = np.array([0x7FFFFFFF, 0xFFFFFFFF], np.uint32).view(np.float32)  # one more would be -0 and 0
    assert np.isnan(rounded(quiet)).all()


@pytest.mark.parametrize("below", [1.0, -1.0, 96.0, -3e-30])
@pytest.mark.parametrize("share", [0.01, 0.3, 0.5, 0.9])
def test_the_mean_is_the_value(below: float, share: float):
    bits = np.array([below], ml_dtypes.bfloat16).view(np.uint16)
    low, high = np.concatenate([bits, bits + np.uint16(1)]).view(ml_dtypes.bfloat16).astype(np.float32)
    value = np.float32(low + share * (high - low))
    found = rounded(np.full((16, COUNT // 16), value))
    assert set(np.unique(found)) == {low, high}
    share = (value - low) / (high - low)
    assert abs(np.mean(found == high) - share) < 4 * (share * (1 - share) / COUNT) ** 0.5


def test_elements_and_keys_are_rounded_independently():
    half = np.full((8, 64, 128), 1 + 2**-8, np.float32)
    first, second = (rounded(half, seed) > 1 for seed in (0, 1))
    neighbours = [(first[1:], first[:-1]), (first[:, 1:], first[:, :-1]), (first[..., 1:], first[..., :-1])]
    for a, b in [(first, second), *neighbours]:
        correlation = np.corrcoef(a.ravel(), b.ravel())[0, 1]
        assert abs(correlation) < 4 / a.size**0.5
    np.testing.assert_array_equal(rounded(half, 1) > 1, second)


@pytest.mark.parametrize("sizes", [{"data": 2, "fsdp": 2, "tensor": 2}, {"fsdp": 8}, {"tensor": 4}], ids=str)
def test_the_mesh_does_not_matter(sizes: dict[str, int]):
    x = np.random.default_rng(0).normal(size=(3, 16, 32)).astype(np.float32)
    with tiny.mesh(**sizes):
        placed = jax.device_put(x, jax.P(None, "fsdp", "tensor"))
        found = jax.jit(rounding.stochastic)(placed, jax.random.key(0))
        assert found.sharding == placed.sharding
        np.testing.assert_array_equal(np.asarray(found, np.float32), rounded(x))


@pytest.mark.parametrize(
    ("step", "count", "expected"),
    [
        (lambda x: x - 1e-4, 200, 0.98),  # updates of a weight
        (lambda x: 0.999 * x, 1000, 0.999**1000),  # a second moment while gradients are 0
    ],
)
def test_small_changes_add_up_where_nearest_rounding_drops_them(step: Callable, count: int, expected: float):
    def run(round_: Callable) -> np.ndarray:
        keys = jax.random.split(jax.random.key(0), count)
        start = jnp.ones((64, 64), jnp.bfloat16)
        return np.asarray(jax.lax.scan(lambda x, key: (round_(step(x.astype(jnp.float32)), key), None), start, keys)[0])

    assert (run(lambda x, _: x.astype(jnp.bfloat16)) == 1).all()
    assert run(rounding.stochastic).astype(np.float32).mean() == pytest.approx(expected, rel=2e-3)
