"""The filters of sampling against transformers' logits warpers, and the frequencies of what is drawn."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdistill.errors import UserError
from jaxdistill.sample.choose import SamplingConfig, candidates, choose

V = 200
SETTINGS = [
    {"temperature": 0.6},
    {"temperature": 1.0, "top_k": 1},
    {"temperature": 0.7, "top_k": 20},
    {"temperature": 1.0, "top_k": 500},  # more than there are
    {"temperature": 1.0, "top_p": 0.95},
    {"temperature": 1.3, "top_p": 0.01},  # the best one stays
    {"temperature": 1.0, "min_p": 0.05},
    {"temperature": 1.0, "min_p": 1.0},
    {"temperature": 0.6, "top_k": 20, "top_p": 0.95},  # as Qwen3 recommends
    {"temperature": 1.5, "top_k": 50, "top_p": 0.9, "min_p": 0.1},
    {"temperature": 1.5, "top_p": 0.9, "min_p": 0.1},
]


def filtered(logits: np.ndarray, c: SamplingConfig) -> np.ndarray:
    """The candidates' logits in the vocabulary's order, minus infinity for all other tokens."""
    found, tokens = jax.jit(lambda x: candidates(x, c))(logits)
    full = np.full(logits.shape, -np.inf, np.float32)
    np.put_along_axis(full, np.asarray(tokens), np.asarray(found), axis=1)
    return full


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_filters_equal_those_of_transformers(settings: dict[str, float]):
    import torch
    from transformers import generation

    logits = np.random.default_rng(0).normal(scale=3, size=(8, V)).astype(np.float32)
    warpers = {
        "temperature": generation.TemperatureLogitsWarper,
        "top_k": generation.TopKLogitsWarper,
        "top_p": generation.TopPLogitsWarper,
        "min_p": generation.MinPLogitsWarper,
    }
    expected = torch.from_numpy(logits)
    for name, value in settings.items():
        expected = warpers[name](value)(torch.zeros(8, 1, dtype=torch.long), expected)
    found = filtered(logits, SamplingConfig(**settings))  # type: ignore[arg-type]
    np.testing.assert_array_equal(np.isfinite(found), np.isfinite(expected.numpy()))
    np.testing.assert_allclose(found, expected.numpy(), rtol=1e-6)


@pytest.mark.parametrize("settings", [{}, {"top_p": 0.9}, {"top_k": 5}, {"min_p": 0.2}], ids=str)
def test_frequencies_follow_the_probabilities(settings: dict[str, float]):
    c = SamplingConfig(temperature=0.8, **settings)  # type: ignore[arg-type]
    logits = np.random.default_rng(1).normal(size=(1, 12)).astype(np.float32)
    count = 4_000
    draw = jax.jit(lambda x, seeds, produced: choose(x, seeds, produced, c))
    rows = jnp.broadcast_to(logits, (count, 12))
    drawn = np.asarray(draw(rows, jnp.arange(count), jnp.zeros(count, jnp.int32)))
    expected = np.asarray(jax.nn.softmax(filtered(logits, c)))[0]
    found = np.bincount(drawn, minlength=12) / count
    assert (found[expected == 0] == 0).all()
    np.testing.assert_allclose(found, expected, atol=5 * 0.5 / count**0.5)
    # One seed, one token after another: the same distribution
    later = np.asarray(draw(rows, jnp.full(count, 5), jnp.arange(count)))
    np.testing.assert_allclose(np.bincount(later, minlength=12) / count, expected, atol=5 * 0.5 / count**0.5)


def test_greedy_takes_the_first_of_the_best():
    logits = jnp.array([[0.0, 2.0, 2.0], [3.0, 1.0, 2.0]])
    zeros = jnp.zeros(2, jnp.int32)
    assert choose(logits, zeros, zeros, SamplingConfig()).tolist() == [1, 0]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": -1.0}, "temperature is -1.0; expected 0 .greedy. or more"),
        ({"top_k": -1}, "expected top_k >= 0"),
        ({"top_p": 0.0}, "0 < top_p <= 1"),
        ({"min_p": 1.5}, "0 <= min_p <= 1"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0; expected 1 or more"),
    ],
)
def test_settings_that_make_no_sense(settings: dict[str, float], message: str):
    with pytest.raises(UserError, match=message):
        SamplingConfig(**settings)  # type: ignore[arg-type]
