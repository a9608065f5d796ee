"""NVIDIA GPUs that are not here: what XLA is told of them, as it knows TPUs alone by name."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
from jax.experimental import topologies

from jaxdistill.data.packing import Batch
from jaxdistill.plan.hardware import Hardware
from jaxdistill.train.step import State

_HOPPER = """\
gpu_device_info {{
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_block_optin: 232448
  shared_memory_per_core: 233472
  threads_per_core_limit: 2048
  core_count: 132
  fpus_per_core: 128
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  memory_bandwidth: {bandwidth:.0f}
  l2_cache_size: 52428800
  clock_rate_ghz: 1.98
  device_memory_size: {memory:.0f}
  cuda_compute_capability {{ major: 9 feature_extension: ACCELERATED_FEATURES }}
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
  driver_version: "13.0.0"
  runtime_version: "13.0.0"
  dnn_version: "9.20.0"
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 20 }}
runtime_version {{ major: 13 }}
device_description_str: "NVIDIA {name}"
"""


def target_config(hardware: Hardware) -> str:
    """A `GpuTargetConfigProto` as text: the Hopper chip's limits by NVIDIA's CUDA programming guide, and its memory.

    cuDNN is said to be new enough (9.8) to be compiled for without a device.
    """
    chip = hardware.chip
    return _HOPPER.format(bandwidth=chip.memory_bandwidth, memory=chip.memory_bytes, name=chip.device_kind)


def devices(hardware: Hardware) -> Sequence[Any]:
    """Stand-ins for the GPUs, nodes joined by the network and each with its GPUs on NVLink.

    Raises:
      RuntimeError: jax's CUDA plugin is not installed.
    """
    nodes, gpus = hardware.shape
    topology = f"{nodes}x1x{gpus}"  # groups that are joined by NVLink, hosts of each, GPUs of each host
    config = target_config(hardware)
    return topologies.get_topology_desc(platform="cuda", target_config=config, topology=topology).devices


def with_moments_on_host(step: Any) -> Any:
    """A training step that first sends the optimizer's state to the host, where it is when the GPUs are there.

    GPUs that are not here have no memories, so jax drops the kind of memory that an argument's layout asks for. Told
    so within the program, the compiler takes the arguments from the host.
    """

    def to_host(x: Any) -> Any:
        return jax.device_put(x, jax.memory.Space.Host) if x.ndim else x

    def moved(state: State, batch: Batch, *frozen: Any) -> Any:
        return step(dataclasses.replace(state, opt_state=jax.tree.map(to_host, state.opt_state)), batch, *frozen)

    return jax.jit(moved, donate_argnums=0)
