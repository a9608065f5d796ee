"""The filters of sampling against transformers' logits warpers, and the frequencies of what is drawn."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdistill.errors import UserError
from jaxdistill.sample.choose import Features, Parameters, choose, filtered
from jaxdistill.sample.request import SamplingConfig

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


def parameters(c: SamplingConfig, rows: int) -> Parameters:
    values = {field.name: np.asarray(getattr(c, field.name)) for field in dataclasses.fields(Parameters)}
    return Parameters(
        **{name: jnp.full(rows, x, jnp.int32 if name == "top_k" else jnp.float32) for name, x in values.items()}
    )


def kept(logits: np.ndarray, c: SamplingConfig) -> np.ndarray:
    """Logits over temperature, minus infinity where a filter drops them."""
    return np.asarray(jax.jit(filtered)(logits / np.float32(c.temperature), parameters(c, len(logits))))


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
    found = kept(logits, SamplingConfig(**settings))  # type: ignore[arg-type]
    np.testing.assert_array_equal(np.isfinite(found), np.isfinite(expected.numpy()))
    np.testing.assert_allclose(found, expected.numpy(), rtol=1e-6)


@pytest.mark.parametrize("settings", [{}, {"top_p": 0.9}, {"top_k": 5}, {"min_p": 0.2}], ids=str)
def test_frequencies_follow_the_probabilities(settings: dict[str, float]):
    c = SamplingConfig(temperature=0.8, **settings)  # type: ignore[arg-type]
    logits = np.random.default_rng(1).normal(size=(1, 12)).astype(np.float32)
    count = 4_000
    p, features = parameters(c, count), Features(draws=True, filters=bool(settings))
    draw = jax.jit(lambda x, seeds, produced: choose(x, p, None, seeds, produced, features))
    rows = jnp.broadcast_to(logits, (count, 12))
    drawn = np.asarray(draw(rows, jnp.arange(count), jnp.zeros(count, jnp.int32)))
    expected = np.asarray(jax.nn.softmax(kept(logits, c)))[0]
    found = np.bincount(drawn, minlength=12) / count
    assert (found[expected == 0] == 0).all()
    np.testing.assert_allclose(found, expected, atol=5 * 0.5 / count**0.5)
    # One seed, one token after another: the same distribution
    later = np.asarray(draw(rows, jnp.full(count, 5), jnp.arange(count)))
    np.testing.assert_allclose(np.bincount(later, minlength=12) / count, expected, atol=5 * 0.5 / count**0.5)


def test_tokens_that_tie_with_the_last_one_stay():
    logits = np.array([[3.0, 1.0, -0.0, 1.0, 1.0, -2.0]], np.float32)
    assert np.isfinite(kept(logits, SamplingConfig(temperature=1.0, top_k=2))).tolist() == [[1, 1, 0, 1, 1, 0]]
    assert np.isfinite(kept(logits, SamplingConfig(temperature=1.0, top_p=0.8))).tolist() == [[1, 1, 0, 1, 1, 0]]


def test_rows_have_settings_of_their_own():
    """What a neighbour asks for, or another program computes, changes no row."""
    logits = np.random.default_rng(2).normal(scale=2, size=(1, V)).astype(np.float32)
    settings = [SamplingConfig(), *[SamplingConfig(**one) for one in SETTINGS]]  # type: ignore[arg-type]
    rows = jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *[parameters(c, 1) for c in settings])
    seeds, produced = jnp.full(len(settings), 7), jnp.arange(len(settings))
    draw = jax.jit(choose, static_argnums=5)
    together = draw(jnp.repeat(logits, len(settings), 0), rows, None, seeds, produced, Features(True, True))
    for i, c in enumerate(settings):
        features = Features(c.temperature > 0, bool(c.top_k or c.top_p < 1 or c.min_p))
        alone = draw(jnp.asarray(logits), parameters(c, 1), None, seeds[:1], produced[i : i + 1], features)
        assert alone.tolist() == [int(together[i])], c


def test_greedy_takes_the_first_of_the_best():
    logits = jnp.array([[0.0, 2.0, 2.0], [3.0, 1.0, 2.0]])
    zeros = jnp.zeros(2, jnp.int32)
    assert choose(logits, parameters(SamplingConfig(), 2), None, zeros, zeros, Features()).tolist() == [1, 0]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": -1.0}, "temperature is -1.0; expected 0 .greedy., or 1e-06 and more"),
        ({"top_k": -1}, "expected top_k >= 0"),
        ({"top_p": 0.0}, "0 < top_p <= 1"),
        ({"min_p": 1.5}, "0 <= min_p <= 1"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"temperature": 1e-40}, "temperature is 1e-40"),
        ({"top_k": 2**31}, "top_k 2147483648"),
        ({"repetition_penalty": 0.0}, "repetition_penalty is 0.0; expected 1e-06 to 1e.06"),
        ({"presence_penalty": float("inf")}, "presence_penalty is inf; expected -1e.06 to 1e.06"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0; expected 1 or more"),
    ],
)
def test_settings_that_make_no_sense(settings: dict[str, float], message: str):
    with pytest.raises(UserError, match=message):
        SamplingConfig(**settings)  # type: ignore[arg-type]
