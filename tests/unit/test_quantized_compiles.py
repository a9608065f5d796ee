"""A projection in 8 bits compiled by the TPU's and the GPU's own compiler for devices that are not here."""

import re
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import kernels
import numpy as np
import pytest
from jax.experimental import topologies
from jax.sharding import AxisType, NamedSharding

from jaxdistill import sharding
from jaxdistill.models import quantized
from jaxdistill.models.quantized import MatmulDtype
from jaxdistill.plan import cuda, hardware

B, T, D, F = 4, 1024, 512, 2048


def compile_for(devices: Sequence[Any], matmul_dtype: MatmulDtype, **options: Any) -> str:
    """The compiled program of a projection's gradients, its weight split over all devices, as text."""
    explicit = (AxisType.Explicit,) * len(sharding.MESH_AXES)
    mesh = jax.sharding.Mesh(np.array(devices).reshape(1, -1, 1, 1), sharding.MESH_AXES, axis_types=explicit)
    x = jax.ShapeDtypeStruct((B, T, D), jnp.bfloat16, sharding=NamedSharding(mesh, sharding.spec("BTD")))
    stored = NamedSharding(mesh, sharding.spec("DF", sharding.STORAGE))

    def loss(x: jax.Array, w: jax.Array) -> jax.Array:
        out = quantized.projection_in(matmul_dtype)("BTD,DF->BTF", x, w)
        return jnp.sum(out.astype(jnp.float32) ** 2)

    with jax.set_mesh(mesh):
        traced = jax.jit(jax.grad(loss, (0, 1))).trace(x, jax.ShapeDtypeStruct((D, F), jnp.float32, sharding=stored))
        lowered = traced.lower(lowering_platforms=({"gpu": "cuda"}.get(devices[0].platform, devices[0].platform),))
        return lowered.compile(compiler_options=options).as_text() or ""


def test_tpus_multiply_int8(monkeypatch: pytest.MonkeyPatch):
    kernels.require("libtpu")
    monkeypatch.setenv("TPU_SKIP_MDS_QUERY", "1")  # else libtpu asks the network what machine this is
    devices = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2").devices
    quantized.check("int8", devices[0])
    program = compile_for(devices, "int8")
    products = re.findall(r"= (\w+)\[[\d,]+\]\S* convolution\(", program)
    assert sorted(products) == ["bf16", "s32", "s32"], "the output, and the gradients of activations and weight"
    assert re.search(rf"= s8\[{D},{F}\]\S* all-gather\(", program), "the weight travels in 8 bits"


def test_h100s_multiply_float8():
    kernels.require("jax_cuda13_plugin")
    devices = cuda.devices(hardware.parse("h100x4"))
    quantized.check("float8", devices[0])
    # Without a device no product is timed, and all would go to untuned Triton kernels, in 8 bits too
    program = compile_for(devices, "float8", xla_gpu_enable_triton_gemm=False)
    assert program.count('custom_call_target="__cublas$lt$matmul$f8"') == 2, "the output, and activations' gradient"
    assert program.count('custom_call_target="__cublas$lt$matmul"') == 1, "the weight's gradient"
    gathered = rf"f8e4m3fn\[{D},{F}\][^\n]* all-gather-start\("
    assert re.search(gathered, program), "the weight travels in 8 bits"
