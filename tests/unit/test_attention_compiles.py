"""Attention compiled by the TPU's and the GPU's own compiler for devices that are not here, by every way it takes."""

from typing import Any

import jax
import jax.numpy as jnp
import kernels
import numpy as np
import pytest
from jax.experimental import topologies
from jax.sharding import AxisType, NamedSharding

from jaxdistill import sharding
from jaxdistill.models.attention import Attention, ContextParallelism, backends
from jaxdistill.models.attention.packed import packed_attention

# What XLA asks of a GPU that it compiles for, as in its backends/gpu/target_config/specs/h100_sxm.txtpb
H100 = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152 shared_memory_per_core: 233472
  threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128 shared_memory_per_block_optin: 232448
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: 3352320000000 l2_cache_size: 52428800 clock_rate_ghz: 1.98 device_memory_size: 84942979072
  cuda_compute_capability { major: 9 feature_extension: ACCELERATED_FEATURES }
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  driver_version: "13.0.0" runtime_version: "13.0.0" dnn_version: "9.20.0"
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 20 }
runtime_version { major: 13 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""


def compile_for(
    devices: list[Any], sizes: dict[str, int], attention: Attention, B: int, T: int, N: int, K: int, H: int
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


@pytest.mark.parametrize(
    ("context", "sizes"), [("all_gather", {"data": 2}), ("ulysses", {"context": 2})], ids=["whole rows", "ulysses"]
)
def test_cudnn_compiles_for_h100(context: ContextParallelism, sizes: dict[str, int]):
    kernels.require("jax_cuda13_plugin")
    devices = topologies.get_topology_desc(platform="cuda", target_config=H100, topology="1x2x1").devices
    assert backends.unavailable("cudnn", devices[0]) is None
    attention = Attention(backend="cudnn", context=context, segments=9)
    program = compile_for(devices, sizes, attention, B=2, T=4096, N=8, K=2, H=128)
    for kernel in ("__cudnn$fmhaSoftmax", "__cudnn$fmhaSoftmaxBackward"):
        assert program.count(f'custom_call_target="{kernel}"') == 1
