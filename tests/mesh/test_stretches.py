"""The MLP of a long row worked on stretch by stretch: the same numbers, less memory, gradients summed in float32."""

from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from jaxdistill import sharding
from jaxdistill.models import layers
from jaxdistill.plan import ahead
from jaxdistill.train.step import loss_sum

B, T, D, F = 4, 512, 16, 48
DIMS = {"w_gate": "DF", "w_up": "DF", "w_down": "FD"}
MESHES = [{}, {"fsdp": 4, "tensor": 2}, {"data": 2, "fsdp": 2, "context": 2}, {"context": 4, "tensor": 2}]


def values() -> tuple[np.ndarray, dict[str, np.ndarray]]:
    generator = np.random.default_rng(0)
    shapes = {"D": D, "F": F}
    weights = {name: generator.normal(size=[shapes[d] for d in dims]) * 0.2 for name, dims in DIMS.items()}
    return generator.normal(size=(B, T, D)), weights


def loss(x: jax.Array, weights: dict[str, jax.Array]) -> jax.Array:
    return jnp.sum(jnp.sin(layers.swiglu(x, SimpleNamespace(**weights), layers.projection).astype(jnp.float32)))


def gradients(stretch: int, patch: pytest.MonkeyPatch, dtype: Any = jnp.float32, **sizes: int) -> Any:
    patch.setattr(layers, "_STRETCH", stretch)
    with tiny.mesh(**sizes):
        x, weights = values()
        x = sharding.put(x.astype(dtype), "BTD")
        layouts = {name: sharding.spec(dims, sharding.STORAGE) for name, dims in DIMS.items()}
        placed = {name: jax.device_put(w.astype(dtype), layouts[name]) for name, w in weights.items()}
        return jax.device_get(jax.jit(jax.value_and_grad(loss, (0, 1)))(x, placed))


@pytest.mark.parametrize("sizes", MESHES, ids=str)
def test_loss_and_gradients_do_not_change(sizes: dict[str, int], monkeypatch: pytest.MonkeyPatch):
    whole = gradients(T, monkeypatch)
    tiny.assert_trees_close(gradients(24, monkeypatch, **sizes), whole, 2e-6)  # 24 divides no row: 16 does


def test_nothing_of_the_mlp_is_as_long_as_the_row(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(layers, "_STRETCH", 64)
    with tiny.mesh():
        x, weights = values()
        program = jax.make_jaxpr(jax.grad(loss, (0, 1)))(x, weights)
    shapes = {variable.aval.shape for e in ahead.equations(program.jaxpr) for variable in e.outvars}
    assert (B, 64, F) in shapes
    assert (B, T, F) not in shapes


def test_many_stretches_lose_no_precision_in_bfloat16(monkeypatch: pytest.MonkeyPatch):
    """Added up in bfloat16, 128 stretches would be several times as far off as the whole row."""
    _, (_, exact) = gradients(T, monkeypatch)

    def error(stretch: int) -> float:
        _, (_, found) = gradients(stretch, monkeypatch, jnp.bfloat16)
        return max(float(np.linalg.norm(found[name] - exact[name]) / np.linalg.norm(exact[name])) for name in DIMS)

    assert error(4) < 1.1 * error(T)


@pytest.mark.parametrize(("positions", "pieces"), [(32_768, 1), (65_536, 4), (500_000, 32), (40_000, 4), (131_101, 1)])
def test_as_few_stretches_as_go(positions: int, pieces: int):
    assert layers._pieces(positions) == pieces, "131,101 is prime"


def test_a_mixture_in_stretches_is_the_same(monkeypatch: pytest.MonkeyPatch):
    """Tokens, the experts that they chose and the shares of these are cut alike."""
    c = tiny.config("qwen3_moe", num_attention_heads=8, num_key_value_heads=2, num_hidden_layers=1)
    found = []
    for stretch, sizes in ((128, {}), (24, {"fsdp": 2, "context": 2, "tensor": 2})):
        monkeypatch.setattr(layers, "_STRETCH", stretch)
        with tiny.mesh(**sizes), jax.default_matmul_precision("highest"):
            params, batch = tiny.put(tiny.values(c), c), tiny.place(tiny.packed([99, 80, 60, 101], c.vocab, 4, 128))
            how = batch, c, jnp.float32, "none", None
            found.append(jax.device_get(jax.jit(jax.value_and_grad(lambda p, how=how: loss_sum(p, *how)))(params)))
    tiny.assert_trees_close(found[1], found[0], 1e-5)
