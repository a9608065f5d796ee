"""Remat policies: what each keeps, by name and by size, and that none changes a gradient."""

from typing import Any, get_args

import jax
import jax.numpy as jnp
import pytest
import tiny

from jaxdistill.data.packing import Batch
from jaxdistill.models import decoder
from jaxdistill.models.remat import Remat
from jaxdistill.train import step as train_step

B, T = 2, 128
C = tiny.config(
    "qwen3", num_hidden_layers=3, hidden_size=40, num_attention_heads=6, num_key_value_heads=2, intermediate_size=56
)
D, NH, KH, F, N = C.embed, C.heads * C.head_dim, C.kv_heads * C.head_dim, 56, C.heads
IN_LAYER = {
    "full": {"device": D},
    "attention": {"device": D + NH + 2 * N},
    "offload": {"pinned_host": D + NH + 2 * N},
    "offload_inputs": {"pinned_host": D},
    "matmuls": {"device": 2 * D + 2 * (NH + KH) + 2 * F + 2 * N},
}


BATCH = tiny.packed([61, 33, 29, 17], C.vocab, B, T)


def loss_sum(params: decoder.Params, batch: Batch, remat: Remat, dtype: Any = jnp.float32) -> jax.Array:
    return train_step.loss_sum(params, batch, C, dtype, remat, None)


def gradients(remat: Remat) -> decoder.Params:
    with tiny.mesh():
        params, batch = tiny.put(tiny.values(C), C), tiny.place(BATCH)
        return jax.device_get(jax.jit(jax.grad(loss_sum), static_argnums=2)(params, batch, remat))


@pytest.fixture(autouse=True, scope="module")
def _compiled_in_a_hurry():
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture(scope="module")
def expected() -> decoder.Params:
    return gradients("none")


@pytest.mark.parametrize("policy", sorted(set(get_args(Remat)) - {"none"}))
def test_gradients_are_those_of_a_step_that_keeps_everything(policy: Remat, expected: decoder.Params):
    tiny.assert_trees_close(gradients(policy), expected, 1e-6)


@pytest.mark.parametrize("policy", IN_LAYER)
def test_values_kept_per_layer_and_token(policy: Remat):
    """In numbers of bfloat16, of which a float32 counts two, by the memory they wait in."""
    with tiny.mesh():
        params, batch = tiny.put(tiny.values(C), C), tiny.place(BATCH)
        kept = jax.jit(lambda params: jax.vjp(lambda p: loss_sum(p, batch, policy, jnp.bfloat16), params)[1])(params)
        own = {w.shape for w in jax.tree.leaves(params)}
        found: dict[str, int] = {}
        for x in jax.tree.leaves(kept):
            if x.shape[0] == C.layers and x.shape not in own and x.size >= C.layers * B * T:
                memory = x.sharding.memory_kind
                found[memory] = found.get(memory, 0) + x.nbytes // (2 * C.layers * B * T)
    assert found == IN_LAYER[policy]
