"""Eight simulated devices: every mesh gives the loss, the gradients and the training steps of one device."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import kernels
import numpy as np
import plain_attention
import pytest
import tiny

from jaxdistill import loss, optim, sharding
from jaxdistill.data.packing import Batch
from jaxdistill.errors import UserError
from jaxdistill.models import decoder, routing
from jaxdistill.models.attention import REFERENCE, Attention, Backend, ContextParallelism, blockwise
from jaxdistill.models.config import Config
from jaxdistill.sharding import MeshConfig
from jaxdistill.train import config as train_config
from jaxdistill.train import step as train_step

MESHES = [
    {"data": 8},
    {"fsdp": 8},
    {"context": 8},
    {"tensor": 8},
    {"data": 2, "context": 4},
    {"fsdp": 4, "tensor": 2},
    {"context": 4, "tensor": 2},
    {"data": 2, "fsdp": 2, "tensor": 2},
    {"fsdp": 2, "context": 2, "tensor": 2},
    {"data": 2, "fsdp": 2, "context": 2},
]
ROWS, T = 8, 64
# Odd lengths; together with the last rows, which stay empty, they leave padding everywhere
LENGTHS = (61, 33, 29, 17, 15, 13, 51, 7, 47, 11, 5, 3, 37, 19, 2, 43)


def architecture(model_type: str, kv_heads: int) -> Config:
    """Eight query heads, and a vocabulary that is split eight ways."""
    return tiny.config(model_type, tied=model_type == "llama", num_attention_heads=8, num_key_value_heads=kv_heads)


@pytest.fixture(autouse=True, scope="module")
def _several_chunks():
    """Attention in blocks that do not divide the row, and the loss of one device in 4 chunks; compiled in a hurry."""
    with pytest.MonkeyPatch.context() as patch, jax.default_matmul_precision("highest"):
        patch.setattr(blockwise, "_QUERY_BLOCK", 7)  # two on a device, where rows are split eight ways
        patch.setattr(blockwise, "_KEY_BLOCK", 24)
        patch.setattr(loss, "_CHUNK_LOGITS", 1)
        jax.config.update("jax_disable_most_optimizations", True)
        yield
        jax.config.update("jax_disable_most_optimizations", False)


def loss_and_gradients(c: Config, remat: decoder.Remat, sizes: dict[str, int], attention: Attention = REFERENCE) -> Any:
    """Loss and gradients of packed rows, on the host."""
    with tiny.mesh(**sizes):
        params, batch = tiny.put(tiny.values(c), c), tiny.place(tiny.packed(LENGTHS, c.vocab, ROWS, T))

        def mean(params: decoder.Params, batch: Batch) -> jax.Array:
            how = jnp.float32, remat, None, attention, "compute"
            loss, routed = train_step.loss_sum_and_routing(params, batch, c, *how)
            balance = routing.balance_loss(routed, c)[0] if c.experts else 0.0
            return loss / jnp.sum(batch.weights) + balance

        value, gradients = jax.jit(jax.value_and_grad(mean))(params, batch)
        for gradient, weight in zip(jax.tree.leaves(gradients), jax.tree.leaves(params), strict=True):
            assert gradient.sharding.spec == weight.sharding.spec, "gradients come in storage layout"
        return jax.device_get((value, gradients))


@pytest.fixture(scope="module")
def on_one_device() -> Any:
    """`loss_and_gradients` on one device, by architecture."""
    found: dict[Config, Any] = {}

    def of(c: Config) -> Any:
        if c not in found:
            found[c] = loss_and_gradients(c, "none", {})
        return found[c]

    return of


def heads_for(sizes: dict[str, int]) -> int:
    """Key/value heads: as many as devices share them, and otherwise a fourth of the query heads."""
    return max(2, sizes.get("tensor", 1))


@pytest.mark.parametrize("sizes", MESHES, ids=str)
def test_loss_and_gradients_equal_one_device(sizes: dict[str, int], on_one_device: Any):
    c = architecture("qwen2", heads_for(sizes))
    expected, expected_gradients = on_one_device(c)
    found, gradients = loss_and_gradients(c, "full", sizes)
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    tiny.assert_trees_close(gradients, expected_gradients, 1e-5)


@pytest.mark.parametrize(
    ("sizes", "kv_heads"),
    [
        ({"context": 8}, 8),
        ({"context": 8}, 2),  # four copies of each key/value head
        ({"data": 2, "context": 4}, 4),
        ({"context": 4, "tensor": 2}, 2),  # one key/value head a device, four copies
        ({"fsdp": 2, "context": 2, "tensor": 2}, 4),
    ],
    ids=str,
)
@pytest.mark.parametrize("backend", ["blockwise", "cudnn"])
def test_ulysses_equals_one_device(
    backend: Backend, sizes: dict[str, int], kv_heads: int, on_one_device: Any, monkeypatch: pytest.MonkeyPatch
):
    kernels.emulate(backend, monkeypatch)
    c = architecture("qwen2", kv_heads)
    expected, expected_gradients = on_one_device(c)
    found, gradients = loss_and_gradients(c, "full", sizes, Attention(backend=backend, context="ulysses"))
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    tiny.assert_trees_close(gradients, expected_gradients, 1e-5)


@pytest.mark.parametrize("context", ["all_gather", "ulysses"])
def test_splash_on_two_devices(context: ContextParallelism, monkeypatch: pytest.MonkeyPatch):
    """On more devices the simulated TPUs of jax 0.10 wait for each other forever; tests/unit takes shards in turn."""
    kernels.emulate("splash", monkeypatch)
    attention = Attention(backend="splash", context=context)
    plain_attention.check(512, [[200, 184, 100]], N=4, K=2, H=64, attention=attention, sizes={"context": 2})


@pytest.mark.parametrize(("model_type", "remat"), [("llama", "matmuls"), ("qwen3", "attention"), ("qwen3", "offload")])
def test_other_families_equal_one_device(model_type: str, remat: decoder.Remat, on_one_device: Any):
    c = architecture(model_type, 2)
    expected, expected_gradients = on_one_device(c)
    found, gradients = loss_and_gradients(c, remat, {"fsdp": 2, "context": 2, "tensor": 2})
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    tiny.assert_trees_close(gradients, expected_gradients, 1e-5)


@pytest.mark.parametrize("sizes", MESHES, ids=str)
def test_experts_equal_one_device(sizes: dict[str, int], on_one_device: Any):
    c = architecture("qwen3_moe", heads_for(sizes))
    expected, expected_gradients = on_one_device(c)
    found, gradients = loss_and_gradients(c, "matmuls" if "fsdp" in sizes else "full", sizes)
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    tiny.assert_trees_close(gradients, expected_gradients, 1e-5)


def test_experts_that_the_mesh_cannot_split():
    c = tiny.config("qwen3_moe", num_experts=6, num_attention_heads=8, num_key_value_heads=8)
    with pytest.raises(UserError, match=r"does not fit: E = 6 is not a multiple of 8 .tensor. "):
        sharding.check_divisible(c.sizes(), MeshConfig(tensor=8).sizes())


def two_steps(
    sizes: dict[str, int], accumulate: int, noise: float = 0.0, row_order: Any = slice(None)
) -> tuple[list[float], Any]:
    """Losses of two optimizer steps, and the weights after them."""
    c = architecture("qwen2", 2)
    # A large eps: Adam divides by the gradient, and one that is only rounding noise would be blown up to a whole step
    settings = optim.OptimConfig(peak_lr=1e-2, eps=1e-3, weight_decay=0.1)
    config = train_step.StepConfig(accumulate=accumulate, compute_dtype="float32", neftune_alpha=noise)
    with tiny.mesh(**sizes):
        optimizer = optim.make(settings, 2, decoder.template(c))
        state = train_step.new_state(tiny.put(tiny.values(c), c), optimizer, seed=1)
        step = train_step.make_step(config, REFERENCE, c, optimizer)
        losses = []
        for number in range(2):
            host = tiny.packed(LENGTHS, c.vocab, ROWS, T, seed=number)
            batch = train_step.place(jax.tree.map(lambda x: x[row_order], host), accumulate)
            state, values = step(state, batch)
            losses.append(float(values["loss"]))
            assert float(values["loss_tokens"]) == host.weights.sum()
        return losses, jax.device_get(state.params)


@pytest.fixture(scope="module")
def noisy_steps_on_one_device() -> tuple[list[float], Any]:
    return two_steps({}, accumulate=2, noise=5.0)


@pytest.mark.parametrize("sizes", [MESHES[4], MESHES[5], MESHES[8]], ids=str)
def test_two_accumulated_steps_equal_one_device(sizes: dict[str, int], noisy_steps_on_one_device: Any):
    """NEFTune is on: its noise too must not depend on the mesh."""
    losses, params = two_steps(sizes, accumulate=2, noise=5.0)
    np.testing.assert_allclose(losses, noisy_steps_on_one_device[0], rtol=2e-6)
    tiny.assert_trees_close(params, noisy_steps_on_one_device[1], 2e-5)


def test_noise_on_embeddings_is_uniform_and_of_the_size_that_neftune_gives_a_document():
    c = architecture("qwen2", 2)
    lengths = np.repeat([[4, 60], [64, 0]], [4, 60], axis=1).astype(np.int32)
    with tiny.mesh(data=2):
        placed = sharding.put(lengths, "BT")
        first, again, other = (
            train_step.neftune_noise(jax.random.key(seed), placed, 5.0, c, jnp.float32) for seed in (0, 0, 1)
        )
    np.testing.assert_array_equal(first, again)
    assert np.abs(np.corrcoef(np.ravel(first), np.ravel(other))[0, 1]) < 0.1
    of_unit_size = np.asarray(first) / (5.0 / np.sqrt(np.maximum(lengths, 1) * c.embed))[..., None]
    for length in (4, 60, 64):
        found = of_unit_size[lengths == length].ravel()
        assert np.abs(found).max() <= 1 + 1e-6
        np.testing.assert_allclose(
            np.quantile(found, [0.05, 0.25, 0.5, 0.75, 0.95]), [-0.9, -0.5, 0, 0.5, 0.9], atol=0.15
        )


def test_loss_is_the_token_mean_whatever_the_accumulation(noisy_steps_on_one_device: tuple[list[float], Any]):
    """Pieces hold different numbers of trained tokens, so a mean of their means would be another number."""
    expected, expected_params = two_steps({}, accumulate=1)
    assert abs(noisy_steps_on_one_device[0][0] / expected[0] - 1) > 1e-3, "NEFTune's noise reaches the loss"
    shuffled = np.random.default_rng(0).permutation(ROWS)
    losses, params = two_steps({"data": 2}, accumulate=4, row_order=shuffled)
    np.testing.assert_allclose(losses, expected, rtol=2e-6)
    tiny.assert_trees_close(params, expected_params, 2e-5)


def test_average_is_the_mean_of_all_steps_until_the_decay_remembers_fewer():
    c = architecture("llama", 2)
    with tiny.mesh(fsdp=2):
        optimizer = optim.make(optim.OptimConfig(peak_lr=1e-2), 3, decoder.template(c))
        state = train_step.new_state(tiny.put(tiny.values(c), c), optimizer, seed=1, average=True)
        config = train_step.StepConfig(compute_dtype="float32")
        step = train_step.make_step(config, REFERENCE, c, optimizer, average_decay=0.5)
        params = []
        for number in range(3):
            batch = train_step.place(tiny.packed(LENGTHS, c.vocab, ROWS, T, seed=number), 1)
            state, _ = step(state, batch)
            params.append(jax.device_get(state.params))
        average = jax.device_get(state.average)
    expected = jax.tree.map(lambda a, b, c: (a + b) / 4 + c / 2, *params)
    tiny.assert_trees_close(average, expected, 1e-6)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"data": 4}, "data 4 x fsdp 1 x context 1 x tensor 1 needs 4 devices, found 8 .*product is 8"),
        ({"data": 3, "tensor": 5}, "needs 15 devices, found 8"),
        ({"data": 0}, "mesh.data is 0; expected 1 or more"),
    ],
)
def test_mesh_that_does_not_fit_the_devices(sizes: dict[str, int], message: str):
    with pytest.raises(UserError, match=message):
        MeshConfig(**sizes).build()


def test_mesh_that_does_not_fit_the_model():
    c = tiny.config("llama", num_attention_heads=4, vocab_size=100)
    with pytest.raises(UserError, match=r"V = 100 is not a multiple of 8 .*N = 4 .*K = 2 "):
        sharding.check_divisible(c.sizes(), MeshConfig(tensor=8).sizes())


def test_rows_that_the_mesh_cannot_split():
    c = architecture("llama", kv_heads=8)

    def check(row_tokens: int, mesh: MeshConfig) -> None:
        config = train_config.TrainConfig(workdir=Path("run"), model=Path("model"), row_tokens=row_tokens, batch_rows=4)
        train_config.check_fits(config, c, mesh.sizes(), jax.devices()[0])

    with pytest.raises(UserError, match=r"4 rows at a time .* make them a multiple of 8"):
        check(64, MeshConfig(fsdp=4))
    with pytest.raises(UserError, match=r"row_tokens 60 is not a multiple of twice mesh.context 8"):
        check(60, MeshConfig(context=8))


def test_build_covers_all_devices():
    mesh = MeshConfig(fsdp=4, tensor=2).build()
    assert dict(mesh.shape) == {"data": 1, "fsdp": 4, "context": 1, "tensor": 2}
    assert set(mesh.axis_types) == {jax.sharding.AxisType.Explicit}
