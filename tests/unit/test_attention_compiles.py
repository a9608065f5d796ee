"""Attention compiled by the TPU's and the GPU's own compiler for devices that are not here, by every way it takes."""

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
from jaxdistill.models.attention import Attention, ContextParallelism, backends, mosaic
from jaxdistill.models.attention.packed import packed_attention
from jaxdistill.plan import cuda, hardware


def compile_for(
    devices: Sequence[Any], sizes: dict[str, int], attention: Attention, B: int, T: int, N: int, K: int, H: int
) -> str:
    """The compiled program of attention's gradients, as text."""
    shape = tuple(sizes.get(axis, 1) for axis in sharding.MESH_AXES)
    explicit = (AxisType.Explicit,) * len(shape)
    mesh = jax.sharding.Mesh(np.array(devices).reshape(shape), sharding.MESH_AXES, axis_types=explicit)

    def argument(letters: str, dtype: Any, *shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, sharding.spec(letters)))

    def loss(q: jax.Array, k: jax.Array, v: jax.Array, segments: jax.Array) -> jax.Array:
        return jnp.sum(packed_attention(q, k, v, segments, attention), dtype=jnp.float32)

    keys = argument("BTKH", jnp.bfloat16, B, T, K, H)
    with jax.set_mesh(mesh):
        step = jax.jit(jax.grad(loss, (0, 1, 2)))
        lowered = step.lower(argument("BTNH", jnp.bfloat16, B, T, N, H), keys, keys, argument("BT", jnp.int32, B, T))
        return lowered.compile().as_text() or ""


@pytest.mark.parametrize("context", ["all_gather", "ulysses"])
def test_splash_compiles_for_tpus(context: ContextParallelism, monkeypatch: pytest.MonkeyPatch):
    kernels.require("tokamax")
    kernels.require("libtpu")
    monkeypatch.setenv("TPU_SKIP_MDS_QUERY", "1")  # else libtpu asks the network what machine this is
    devices = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2").devices
    assert backends.unavailable("splash", devices[0]) is None
    attention = Attention(backend="splash", context=context)
    program = compile_for(devices, {"data": 2, "context": 2}, attention, B=2, T=4096, N=8, K=2, H=64)
    assert program.count('custom_call_target="tpu_custom_call"') == 2, "a forward and a backward kernel"


@pytest.mark.parametrize("sizes", [{"data": 2}, {"context": 2}], ids=str)
@pytest.mark.parametrize("H", mosaic.HEAD_DIMS)
def test_mosaic_compiles_for_h100(H: int, sizes: dict[str, int], monkeypatch: pytest.MonkeyPatch):
    kernels.require("jax_cuda13_plugin")
    kernels.require("tokamax", "0.0.16")
    devices = cuda.devices(hardware.parse("h100x2"))
    assert backends.unavailable("mosaic", devices[0]) is None
    monkeypatch.setattr("jax.extend.backend.get_default_device", lambda: devices[0])  # which tokamax asks what it is
    program = compile_for(devices, sizes, Attention(backend="mosaic"), B=2, T=4096, N=8, K=2, H=H)
    assert program.count('custom_call_target="mosaic_gpu') >= 3, "a forward kernel, and two of the backward pass"


@pytest.mark.parametrize(
    ("context", "sizes"), [("all_gather", {"data": 2}), ("ulysses", {"context": 2})], ids=["whole rows", "ulysses"]
)
def test_cudnn_compiles_for_h100(context: ContextParallelism, sizes: dict[str, int]):
    kernels.require("jax_cuda13_plugin")
    devices = cuda.devices(hardware.parse("h100x2"))
    assert backends.unavailable("cudnn", devices[0]) is None
    attention = Attention(backend="cudnn", context=context, segments=9)
    program = compile_for(devices, sizes, attention, B=2, T=4096, N=8, K=2, H=128)
    for kernel in ("__cudnn$fmhaSoftmax", "__cudnn$fmhaSoftmaxBackward"):
        assert program.count(f'custom_call_target="{kernel}"') == 1
