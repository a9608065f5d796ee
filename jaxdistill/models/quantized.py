"""Projections multiplied in 8 bits: float8 on H100, int8 on TPUs, with a scale per token and per output channel.

Written out here, and not taken from qwix, because there weights are quantized only after they were gathered.
"""

import functools
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import struct
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from jaxdistill import chips, weights
from jaxdistill.errors import UserError
from jaxdistill.models.config import Config
from jaxdistill.models.layers import PROJECTION_NAME, Projection, matmul, projection
from jaxdistill.sharding import einsum, gather, spec
from jaxdistill.weights import Weight

MatmulDtype = Literal["compute", "float8", "int8"]

STORED = {"float8": jnp.float8_e4m3fn, "int8": jnp.int8}
_LARGEST = {jnp.dtype(jnp.float8_e4m3fn): 448.0, jnp.dtype(jnp.int8): 127.0}
_SMALLEST_SCALE = 1e-30  # of a token or channel that is all zeros


def unavailable(matmul_dtype: MatmulDtype, device: Any) -> str | None:
    """Why multiplying in 8 bits is no use on a device; None where it is faster, and on CPUs, which only emulate it.

    Args:
      device: a jax.Device, or what a topology description has in its place.
    """
    if matmul_dtype == "compute" or device.platform == "cpu":
        return None
    chip = chips.of_device(device.device_kind)
    if chip is not None and chip.flops(matmul_dtype) > chip.bf16_flops:
        return None
    able = [chip.name for chip in chips.CHIPS.values() if chip.flops(matmul_dtype) > chip.bf16_flops]
    return f"faster than bfloat16 it is on {', '.join(able)}; found {device.device_kind}"


def check(matmul_dtype: MatmulDtype, device: Any) -> None:
    """Refuses, before anything is read, what a device does not have.

    Raises:
      UserError: it does not multiply in 8 bits.
    """
    if reason := unavailable(matmul_dtype, device):
        raise UserError(f"step.matmul_dtype {matmul_dtype}: {reason}; use compute, the default")


def check_model(matmul_dtype: MatmulDtype, c: Config) -> None:
    """Refuses models most of whose products would stay in compute dtype.

    Raises:
      UserError: the model has experts, and the dtype has 8 bits.
    """
    if matmul_dtype != "compute" and c.experts:
        raise UserError(
            f"{matmul_dtype} for the weights of a {c.model_type}: experts in 8 bits are not implemented; use compute, "
            "the default (step.matmul_dtype in training, weight_dtype in sampling)"
        )


def describe(matmul_dtype: MatmulDtype, device: Any) -> str:
    """What the projections of the layers are multiplied in."""
    if matmul_dtype == "compute":
        return "the compute dtype"
    emulated = ", emulated: the numbers are those of the hardware that has it, the speed is not"
    return matmul_dtype + emulated * (device.platform == "cpu")


def projection_in(matmul_dtype: MatmulDtype) -> Projection:
    """How the projections of the layers are multiplied.

    In 8 bits, activations (by token) and weights (by output channel) are divided by the scale that takes their largest
    value to the largest of the format, and the product is multiplied by both scales. The gradient of the activations is
    made in the same way from the same 8-bit weights; their scales go into what they are multiplied with. The gradient
    of the weights is a product in compute dtype: it adds up over all tokens, where rounding to 8 bits costs the most
    (SwitchBack, arXiv 2304.13013). So two of three products are in 8 bits, three of four with the forward pass again.

    Weights are quantized before they are gathered over fsdp: half the bytes of bfloat16 travel.
    """
    if matmul_dtype == "compute":
        return projection
    return lambda equation, x, w: checkpoint_name(_project(matmul_dtype, equation, x, w), PROJECTION_NAME)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _project(matmul_dtype: str, equation: str, x: Array, w: Array) -> Array:
    return _forward(matmul_dtype, equation, x, w)[0]


def _forward(matmul_dtype: str, equation: str, x: Array, w: Array) -> tuple[Array, tuple[Array, ...]]:
    x_dims, w_dims, out_dims = equation.replace("->", ",").split(",")
    x8, x_scale = quantize(x, x_dims, out_dims, STORED[matmul_dtype])
    w8, w_scale = _gathered(matmul_dtype, w, w_dims, out_dims)
    out = (_product(equation, x8, w8, x.dtype) * x_scale * w_scale).astype(x.dtype)
    return out, (x, w, w8, w_scale)  # what is gathered to compute this again is gathered once for the backward pass


def _backward(matmul_dtype: str, equation: str, residuals: tuple[Array, ...], g: Array) -> tuple[Array, Array]:
    x, w, w8, w_scale = residuals
    x_dims, w_dims, out_dims = equation.replace("->", ",").split(",")
    g8, g_scale = quantize(g * w_scale, out_dims, x_dims, STORED[matmul_dtype])
    # The highest precision: cuBLAS otherwise adds up products of float8 in less than float32
    dx = _product(f"{out_dims},{w_dims}->{x_dims}", g8, w8, x.dtype, precision="highest")
    (dw,) = jax.linear_transpose(functools.partial(matmul, equation, x), w)(g)
    return (dx * g_scale).astype(x.dtype), dw


_project.defvjp(_forward, _backward)


def _product(equation: str, a8: Array, b8: Array, dtype: Any, **how: Any) -> Array:
    """The product of 8-bit numbers: int32, or what is left of a float32 sum in compute dtype."""
    sums = jnp.int32 if a8.dtype == jnp.int8 else dtype
    return einsum(equation, a8, b8, preferred_element_type=sums, **how)


def quantize(x: Array, dims: str, out_dims: str, dtype: Any) -> tuple[Array, Float[Array, "..."]]:
    """Numbers in 8 bits, and their float32 scale for every index that a product with dimensions `out_dims` keeps.

    The scale is shaped to be multiplied with that product.

    Args:
      dtype: one of STORED.
    """
    contracted = tuple(i for i, letter in enumerate(dims) if letter not in out_dims)
    x = x.astype(jnp.float32)
    scale = jnp.maximum(jnp.max(jnp.abs(x), axis=contracted) / _LARGEST[jnp.dtype(dtype)], _SMALLEST_SCALE)
    scaled = x / jnp.expand_dims(scale, contracted)
    stored = (jnp.round(scaled) if jnp.dtype(dtype) == jnp.int8 else scaled).astype(dtype)
    return stored, jnp.expand_dims(scale, [i for i, letter in enumerate(out_dims) if letter not in dims])


@struct.dataclass
class Stored:
    """A matrix that is kept in 8 bits, and multiplied in what it is multiplied with; for sampling."""

    values: Weight  # in storage layout
    scale: Weight  # float32, shaped to be multiplied with the product


def weight(w: Array, declared: weights.Declared, dtype: MatmulDtype) -> Stored:
    """One layer's matrix in 8 bits, with a scale per output channel.

    Args:
      declared: as the family does; Hugging Face's last dimension is what the matrix is multiplied over.
    """
    dims = declared.layer_dims.replace(" ", "")
    inputs = declared.hf_dims[declared.hf_dims.rfind("(") :] if declared.hf_dims.endswith(")") else declared.hf_dims[-1]
    outputs = "".join(letter for letter in dims if letter not in inputs)
    values, scale = quantize(w, dims, f"BT{outputs}", STORED[dtype])
    return Stored(values, jax.sharding.reshard(scale, spec(f"..{outputs}")))


def stored_projection(equation: str, x: Array, w: Array | Stored) -> Array:
    """As `layers.projection`, of a matrix in compute dtype or in 8 bits, without a gradient."""
    if not isinstance(w, Stored):
        return matmul(equation, x, w)
    dims = equation.split("->")[0].split(",")[1]
    values = gather(w.values, dims, w.values.dtype).astype(x.dtype)
    return (einsum(equation, x, values) * w.scale).astype(x.dtype)


def _gathered(matmul_dtype: str, w: Array, dims: str, out_dims: str) -> tuple[Array, Float[Array, "..."]]:
    """`quantize` of a stored weight, in compute layout."""
    stored, scale = quantize(w, dims, out_dims, STORED[matmul_dtype])
    of_scale = "".join(letter if letter in dims else "." for letter in out_dims)
    return gather(stored, dims, stored.dtype), jax.sharding.reshard(scale, spec(of_scale))
