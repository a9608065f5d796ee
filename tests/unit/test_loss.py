"""The chunked cross-entropy against the plain one: value, both gradients, and what it never holds."""

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from jaxdistill import loss, sharding
from jaxdistill.data.packing import Batch
from jaxdistill.train import step as train_step

B, T, D, V = 4, 1024, 16, 64
MESHES = [{}, {"tensor": 8}, {"fsdp": 2, "context": 2, "tensor": 2}, {"data": 2, "fsdp": 2, "tensor": 2}]

SHIPPED_CHUNK_LOGITS = loss._CHUNK_LOGITS


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(loss, "_CHUNK_LOGITS", 1)  # 128 tokens, the least: 32 chunks on one device


def draw(dtype: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Hidden states, head, targets and weights; a third of the targets weighs nothing."""
    generator = np.random.default_rng(0)
    x = np.asarray(jnp.asarray(generator.normal(size=(B, T, D)), dtype))
    w = generator.normal(size=(V, D)).astype(np.float32)
    targets = generator.integers(0, V, (B, T)).astype(np.int32)
    weights = generator.choice([0.0, 1.0, 0.5], (B, T)).astype(np.float32)
    return x, w, targets, weights


def plain(x: Any, w: Any, targets: Any, weights: Any) -> jax.Array:
    """Every logit at once, float32."""
    logits = jnp.einsum("BTD,VD->BTV", x, w)
    chosen = jnp.take_along_axis(jax.nn.log_softmax(logits), targets[..., None], axis=-1)[..., 0]
    return -jnp.sum(weights * chosen)


@pytest.fixture(scope="module")
def reference() -> dict[str, Any]:
    """Value and gradients by dtype of x, in float32 from the rounded inputs."""
    found = {}
    with jax.default_matmul_precision("highest"):
        for dtype in ("float32", "bfloat16"):
            x, w, targets, weights = draw(dtype)
            rounded = np.asarray(jnp.asarray(w, dtype), np.float32)
            gradient = jax.jit(jax.value_and_grad(plain, argnums=(0, 1)))
            found[dtype] = jax.device_get(gradient(x.astype(np.float32), rounded, targets, weights))
    return found


def chunked(dtype: str, sizes: dict[str, int]) -> Any:
    """(value, (dx, dw)) of the function under test on a mesh."""
    x, w, targets, weights = draw(dtype)
    with tiny.mesh(**sizes) as mesh, jax.default_matmul_precision("highest"):
        head = jax.device_put(w, jax.sharding.NamedSharding(mesh, sharding.spec("VD", sharding.STORAGE)))
        rows = (sharding.put(x, "BTD"), head, sharding.put(targets, "BT"), sharding.put(weights, "BT"))
        gradient = jax.jit(jax.value_and_grad(lambda *a: loss.cross_entropy_sum(*a), argnums=(0, 1)))
        value, (dx, dw) = gradient(*rows)
        assert dw.dtype == jnp.float32
        assert dx.dtype == jnp.dtype(dtype)
        assert dw.sharding.spec == head.sharding.spec, "the head's gradient comes in storage layout"
        without = jax.jit(lambda *a: loss.cross_entropy_sum(*a))(*rows)
        np.testing.assert_allclose(without, value, rtol=1e-6)
        return jax.device_get((value, (dx, dw)))


@pytest.mark.parametrize("sizes", MESHES, ids=str)
def test_float32_equals_plain_cross_entropy(sizes: dict[str, int], reference: dict[str, Any]):
    value, gradients = chunked("float32", sizes)
    np.testing.assert_allclose(value, reference["float32"][0], rtol=1e-5)
    tiny.assert_trees_close(gradients, reference["float32"][1], 2e-6)


@pytest.mark.parametrize("sizes", [MESHES[0], MESHES[2]], ids=str)
def test_bfloat16_gradient_of_the_head_is_summed_in_float32(sizes: dict[str, int], reference: dict[str, Any]):
    value, (dx, dw) = chunked("bfloat16", sizes)
    expected, (expected_dx, expected_dw) = reference["bfloat16"]
    np.testing.assert_allclose(value, expected, rtol=1e-4)

    def off(a: np.ndarray, b: np.ndarray) -> float:
        return float(np.linalg.norm(a.astype(np.float64) - b) / np.linalg.norm(b))

    assert off(dx, expected_dx) < 4e-3  # bfloat16 itself rounds by up to 2**-9 = 2e-3
    assert off(dw, expected_dw) < 2e-3  # summed in bfloat16 over these 32 chunks it would be over 5e-3


def test_chunks_that_do_not_divide_the_tokens():
    x, w, targets, weights = (a[:3, :100] if a.ndim > 1 and a.shape[0] == B else a for a in draw("float32"))
    with tiny.mesh() as mesh, jax.default_matmul_precision("highest"):
        head = jax.device_put(w, jax.sharding.NamedSharding(mesh, sharding.spec("VD", sharding.STORAGE)))
        rows = (sharding.put(x, "BTD"), head, sharding.put(targets, "BT"), sharding.put(weights, "BT"))
        found = jax.jit(jax.value_and_grad(lambda *a: loss.cross_entropy_sum(*a), argnums=(0, 1)))(*rows)
    expected = jax.jit(jax.value_and_grad(plain, argnums=(0, 1)))(x, w, targets, weights)
    np.testing.assert_allclose(found[0], expected[0], rtol=1e-5)
    tiny.assert_trees_close(found[1], expected[1], 2e-6)


def test_large_logits_do_not_overflow():
    x, w, targets, weights = draw("float32")
    with tiny.mesh():
        rows = (sharding.put(x * 1e3, "BTD"), sharding.put(w, "VD"), sharding.put(targets, "BT"))
        value = jax.jit(lambda *a: loss.cross_entropy_sum(*a))(*rows, sharding.put(weights, "BT"))
    assert np.isfinite(float(value))


def largest_array(program: str) -> int:
    """Elements of the largest array that a compiled program names."""
    shapes = re.findall(r"\b(?:f|bf|s|u|pred)\d*\[([\d,]+)\]", program)
    return max(int(np.prod([int(size) for size in shape.split(",")])) for shape in shapes)


@pytest.mark.parametrize("chunk_logits", [1, SHIPPED_CHUNK_LOGITS])
def test_logits_of_a_row_are_never_materialized(chunk_logits: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(loss, "_CHUNK_LOGITS", chunk_logits)
    c = tiny.config("llama", tied=True, vocab_size=8192)  # then logits outweigh attention scores
    host = tiny.values(c)
    rows = tiny.packed([100, 56, 99, 80], c.vocab, rows=2, row_tokens=256)
    with tiny.mesh():
        params = tiny.put(host, c)

        def value(params: Any, batch: Batch) -> jax.Array:
            return train_step.loss_sum(params, batch, c, jnp.float32, "full", None)

        program = jax.jit(jax.value_and_grad(value)).lower(params, tiny.place(rows)).compile().as_text()
    assert program is not None
    largest = largest_array(program)
    assert 128 * c.vocab <= largest, "the pattern finds the logits of a chunk of 128 tokens"
    assert largest < 256 * c.vocab, "the logits of a row of 256 tokens are never there"
