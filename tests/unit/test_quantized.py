"""Projections in 8 bits: how far they are off, that training does not notice, and where they are refused."""

from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from jaxdistill import optim, sharding
from jaxdistill.errors import UserError
from jaxdistill.models import decoder, quantized
from jaxdistill.models.attention import REFERENCE
from jaxdistill.models.quantized import MatmulDtype
from jaxdistill.train import step as train_step

EQUATIONS = ["BTD,DNH->BTNH", "BTNH,NHD->BTD", "BTD,DF->BTF", "BTF,FD->BTD"]
SIZES = {"B": 4, "T": 16, "D": 64, "N": 4, "H": 16, "F": 128}
C = tiny.config("qwen3", num_hidden_layers=1)


def operands(equation: str, outlier: float = 1.0) -> tuple[jax.Array, jax.Array, np.ndarray]:
    """Activations, a stored weight, a gradient of their product; one token and one channel are `outlier` x larger."""
    generator = np.random.default_rng(0)
    x, w, out = (
        generator.normal(size=[SIZES[letter] for letter in dims]).astype(np.float32)
        for dims in equation.replace("->", ",").split(",")
    )
    x[0, 0] *= outlier
    w[..., 0] *= outlier
    stored = jax.device_put(w, sharding.spec(equation.split("->")[0].split(",")[1], sharding.STORAGE))
    return sharding.put(x, equation.split(",")[0]), stored, out


@pytest.fixture(autouse=True, scope="module")
def _compiled_in_a_hurry():
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


def product_and_gradients(matmul_dtype: MatmulDtype, equation: str, x: Any, w: Any, g: Any) -> list[np.ndarray]:
    """The product, and the gradients of activations and weight."""
    out, pull = jax.vjp(lambda x, w: quantized.projection_in(matmul_dtype)(equation, x, w), x, w)
    return jax.device_get([out, *pull(sharding.put(g, equation.split("->")[1]))])


def relative_error(found: Any, exact: Any) -> float:
    return float(np.linalg.norm(found - exact) / np.linalg.norm(exact))


@pytest.mark.parametrize("sizes", [{}, {"fsdp": 2, "context": 2, "tensor": 2}], ids=str)
@pytest.mark.parametrize("equation", EQUATIONS)
@pytest.mark.parametrize("matmul_dtype", ["float8", "int8"])
def test_errors_are_those_of_rounding(matmul_dtype: MatmulDtype, equation: str, sizes: dict[str, int]):
    """A float8 is off by up to 2**-4 of itself, 2.6% on average; an int8 by 0.4% of the largest of its channel."""
    with tiny.mesh(**sizes):
        x, w, g = operands(equation)
        exact = product_and_gradients("compute", equation, x, w, g)
        found = product_and_gradients(matmul_dtype, equation, x, w, g)
    limit = {"float8": 0.04, "int8": 0.012}[matmul_dtype]
    for a, b in zip(found[:2], exact[:2], strict=True):
        assert 0.001 < relative_error(a, b) < limit
        assert np.abs(a - b).max() < 6 * limit * np.sqrt(np.mean(b**2)), "no number is far off"
    assert relative_error(found[2], exact[2]) < 1e-6, "the weight's gradient is not rounded"


@pytest.mark.parametrize("matmul_dtype", ["float8", "int8"])
def test_a_large_token_or_channel_costs_the_others_nothing(matmul_dtype: MatmulDtype):
    """With one scale for the whole tensor, what is a thousand times smaller than the largest would be lost in int8."""
    equation = "BTD,DF->BTF"
    with tiny.mesh():
        plain, large = (
            product_and_gradients(matmul_dtype, equation, *operands(equation, outlier)) for outlier in (1.0, 1024.0)
        )
    np.testing.assert_allclose(large[0][1:, :, 1:], plain[0][1:, :, 1:], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(large[0][0, 0, 1:], 1024 * plain[0][0, 0, 1:], rtol=1e-5, atol=1e-2)


@pytest.mark.parametrize("matmul_dtype", ["float8", "int8"])
def test_zeros_stay_zeros(matmul_dtype: MatmulDtype):
    with tiny.mesh():
        x, w, g = operands("BTD,DF->BTF")
        for found in product_and_gradients(matmul_dtype, "BTD,DF->BTF", x * 0, w * 0, g):
            np.testing.assert_array_equal(found, 0.0)


def gradients(matmul_dtype: MatmulDtype, dtype: Any) -> list[np.ndarray]:
    """Of each weight of a model, flat."""
    with tiny.mesh(fsdp=2):
        params, batch = tiny.put(tiny.values(C), C), tiny.place(tiny.packed([61, 33, 29], C.vocab, 2, 64))

        def loss(params: decoder.Params) -> jax.Array:
            return train_step.loss_sum(params, batch, C, dtype, "full", None, REFERENCE, matmul_dtype)

        found = jax.device_get(jax.jit(jax.grad(loss))(params))
    return [np.asarray(leaf, np.float32).ravel() for leaf in jax.tree.leaves(found)]


@pytest.fixture(scope="module")
def exact_gradients() -> list[np.ndarray]:
    return gradients("compute", jnp.float32)


@pytest.mark.parametrize("matmul_dtype", ["float8", "int8"])
def test_gradients_of_a_model_point_the_same_way(matmul_dtype: MatmulDtype, exact_gradients: list[np.ndarray]):
    pairs = zip(gradients(matmul_dtype, jnp.bfloat16), exact_gradients, strict=True)
    cosines = [float(a @ b / np.linalg.norm(a) / np.linalg.norm(b)) for a, b in pairs]
    assert min(cosines) > {"float8": 0.98, "int8": 0.998}[matmul_dtype]


def trained(matmul_dtype: MatmulDtype, steps: int = 60) -> list[float]:
    """Losses of a model that learns one batch by heart."""
    with tiny.mesh(fsdp=2):
        optimizer = optim.make(optim.OptimConfig(peak_lr=1e-2), steps, decoder.template(C))
        state = train_step.new_state(tiny.put(tiny.values(C), C), optimizer, seed=0)
        config = train_step.StepConfig(compute_dtype="float32", matmul_dtype=matmul_dtype)
        step = train_step.make_step(config, REFERENCE, C, optimizer)
        batch, losses = train_step.place(tiny.packed([61, 33, 29], C.vocab, 2, 64), 1), []
        for _ in range(steps):
            state, values = step(state, batch)
            losses.append(float(values["loss"]))
        return losses


@pytest.fixture(scope="module")
def exact_losses() -> list[float]:
    return trained("compute")


@pytest.mark.parametrize("matmul_dtype", ["float8", "int8"])
def test_a_model_learns_as_fast_in_8_bits(matmul_dtype: MatmulDtype, exact_losses: list[float]):
    """Every loss on the way is within 5% of the first one; the last is as far down."""
    losses = trained(matmul_dtype)
    assert losses != exact_losses
    assert exact_losses[-1] < 0.1 * exact_losses[0]
    assert losses[-1] < 0.1 * exact_losses[0]
    assert np.abs(np.subtract(losses, exact_losses)).max() < 0.05 * exact_losses[0]


def device(kind: str, platform: str) -> SimpleNamespace:
    return SimpleNamespace(device_kind=kind, platform=platform)


@pytest.mark.parametrize(
    ("kind", "platform", "expected"),
    [
        ("NVIDIA H100 80GB HBM3", "gpu", ["compute", "float8"]),
        ("NVIDIA H200", "gpu", ["compute", "float8"]),
        ("NVIDIA A100-SXM4-80GB", "gpu", ["compute"]),
        ("NVIDIA GeForce GTX 1080", "gpu", ["compute"]),
        ("TPU v4", "tpu", ["compute"]),
        ("TPU v5 lite", "tpu", ["compute", "int8"]),
        ("TPU v5", "tpu", ["compute", "int8"]),
        ("TPU v6 lite", "tpu", ["compute", "int8"]),
        ("TPU7x", "tpu", ["compute", "float8"]),
        ("cpu", "cpu", ["compute", "float8", "int8"]),
    ],
)
def test_what_is_available(kind: str, platform: str, expected: list[str]):
    dtypes: list[MatmulDtype] = ["compute", "float8", "int8"]
    assert [d for d in dtypes if quantized.unavailable(d, device(kind, platform)) is None] == expected


def test_what_a_device_lacks_is_refused():
    quantized.check("int8", device("TPU v5", "tpu"))
    message = r"step.matmul_dtype float8: faster than bfloat16 it is on tpu7x, h100, h200; found TPU v5; use compute"
    with pytest.raises(UserError, match=message):
        quantized.check("float8", device("TPU v5", "tpu"))


def test_a_cpu_says_that_it_emulates():
    assert quantized.describe("int8", device("cpu", "cpu")).startswith("int8, emulated")
    assert quantized.describe("int8", device("TPU v5", "tpu")) == "int8"
