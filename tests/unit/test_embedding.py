"""The embedding lookup: the rows of the table and their gradients on every mesh, and what it moves to get them."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from jaxdistill import sharding
from jaxdistill.models import embedding
from jaxdistill.plan import collectives

B, T, D, V = 8, 8, 64, 4096
MESHES = [{}, {"data": 8}, {"fsdp": 8}, {"context": 8}, {"tensor": 8}, {"fsdp": 2, "context": 2, "tensor": 2}]


def arguments(dtype: Any = np.float32) -> tuple[jax.Array, jax.Array, jax.Array]:
    """A table in storage layout, tokens of which some repeat on all devices, and an integer gradient of each row."""
    generator = np.random.default_rng(0)
    table = generator.normal(size=(V, D)).astype(dtype)
    tokens = np.where(generator.random((B, T)) < 0.5, 3, generator.integers(0, V, (B, T)))
    gradient = generator.integers(-8, 8, (B, T, D)).astype(dtype)
    layout = jax.sharding.NamedSharding(jax.sharding.get_mesh(), sharding.spec("VD", sharding.STORAGE))
    placed = sharding.put(tokens.astype(np.int32), "BT"), sharding.put(gradient, "BTD")
    return jax.device_put(table, layout), *placed


@jax.jit
def rows_and_gradient(table: jax.Array, tokens: jax.Array, g: jax.Array) -> tuple[jax.Array, jax.Array]:
    rows, pull = jax.vjp(lambda table: embedding.lookup(table, tokens, g.dtype), table)
    return rows, pull(g)[0]


@pytest.mark.parametrize("dtype", [np.float32, jnp.bfloat16])
@pytest.mark.parametrize("sizes", MESHES, ids=str)
def test_rows_and_their_gradient_are_exact_on_every_mesh(sizes: dict[str, int], dtype: Any):
    with tiny.mesh(**sizes):
        table, tokens, g = arguments(dtype)
        rows, gradient = rows_and_gradient(table, tokens, g)
        assert gradient.sharding == table.sharding
        assert gradient.dtype == table.dtype
        np.testing.assert_array_equal(rows, np.asarray(table)[np.asarray(tokens)])
        expected = np.zeros((V, D), np.float32)
        np.add.at(expected, np.asarray(tokens), np.asarray(g, np.float32))
        np.testing.assert_array_equal(gradient, expected.astype(dtype))


@pytest.mark.parametrize("sizes", MESHES[1:], ids=str)
def test_the_table_stays_where_it_is(sizes: dict[str, int]):
    """All that is as large as the table is its gradient, of which each device adds up its own part."""
    with tiny.mesh(**sizes):
        program = rows_and_gradient.lower(*arguments()).compile().as_text()
    found = collectives.read(program or "")
    own_part = V * D * 4 // (sizes.get("fsdp", 1) * sizes.get("context", 1) * sizes.get("tensor", 1))
    moved = {(c.kind, c.payload_bytes) for c in found if c.group > 1 and c.payload_bytes > B * T * D * 4}
    assert moved == ({("all-reduce", own_part)} if "data" in sizes else set())


@pytest.mark.parametrize("dtype", [np.float32, jnp.bfloat16])
def test_gradient_is_added_up_in_float32(dtype: Any):
    """One token 4,864 times: added up in bfloat16, ones stop at 256."""
    with tiny.mesh():
        tokens = sharding.put(np.full((1, 4864), 3, np.int32), "BT")
        table = jnp.zeros((8, 4), dtype, out_sharding=sharding.spec("VD", sharding.STORAGE))
        gradient = jax.grad(lambda w: jnp.sum(embedding.lookup(w, tokens, jnp.bfloat16).astype(jnp.float32)))(table)
        np.testing.assert_array_equal(np.asarray(gradient)[3], 4864.0)
