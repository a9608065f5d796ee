"""What one accelerator chip can do by its maker's data sheet; MFU and the planner count against it."""

import dataclasses
from collections.abc import Mapping


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chip:
    """One chip. Bandwidths are one way."""

    name: str
    platform: str  # of jax: "tpu" or "cuda"
    device_kind: str  # what jax calls its devices, or a part of it
    bf16_flops: float  # FLOP/s, dense
    float8_flops: float | None = None  # FLOP/s, dense, where it is faster than bf16
    int8_flops: float | None = None  # the same; of GPUs it is left out: float8 is as fast there, and more accurate
    memory_bytes: float  # that programs can use
    memory_bandwidth: float  # bytes/s
    link_bandwidth: float  # bytes/s within a slice or a node, over all links
    network_bandwidth: float  # bytes/s between slices or nodes
    host_bytes: float  # host memory that falls to one chip
    host_bandwidth: float = 16e9  # bytes/s between chip and host; of TPUs not published, PCIe 3 x16 is assumed
    topology: str = ""  # what jax calls the generation when it compiles ahead of time
    devices: int = 1  # of jax in one chip
    usd_per_hour: float | None = None  # on demand, list price of 2025; prices differ by region and contract

    def flops(self, matmul_dtype: str) -> float:
        """FLOP/s in "float8" or "int8", of bfloat16 where it has none of its own for them, and for "compute"."""
        return {"float8": self.float8_flops, "int8": self.int8_flops}.get(matmul_dtype) or self.bf16_flops


_GIB, _G, _T = 2.0**30, 1e9, 1e12
_H100 = Chip(
    name="h100",
    platform="cuda",
    device_kind="H100",
    bf16_flops=989.5 * _T,
    float8_flops=1979 * _T,
    memory_bytes=79.1 * _GIB,
    memory_bandwidth=3350 * _G,
    link_bandwidth=450 * _G,
    network_bandwidth=50 * _G,
    host_bytes=250 * _GIB,
    host_bandwidth=64 * _G,
    usd_per_hour=3.00,
)
CHIPS: Mapping[str, Chip] = {
    chip.name: chip
    for chip in (
        Chip(
            name="v4",
            platform="tpu",
            device_kind="TPU v4",
            topology="v4",
            bf16_flops=275 * _T,
            memory_bytes=31.25 * _GIB,
            memory_bandwidth=1228 * _G,
            link_bandwidth=300 * _G,
            network_bandwidth=6.25 * _G,
            host_bytes=100 * _GIB,
            usd_per_hour=3.22,
        ),
        Chip(
            name="v5e",
            platform="tpu",
            device_kind="TPU v5 lite",
            topology="v5e",
            bf16_flops=197 * _T,
            int8_flops=393 * _T,
            memory_bytes=15.75 * _GIB,
            memory_bandwidth=819 * _G,
            link_bandwidth=200 * _G,
            network_bandwidth=3.125 * _G,
            host_bytes=48 * _GIB,
            usd_per_hour=1.20,
        ),
        Chip(
            name="v5p",
            platform="tpu",
            device_kind="TPU v5",  # after "TPU v5 lite", which contains it
            topology="v5",
            bf16_flops=459 * _T,
            int8_flops=918 * _T,
            memory_bytes=95 * _GIB,
            memory_bandwidth=2765 * _G,
            link_bandwidth=600 * _G,
            network_bandwidth=6.25 * _G,
            host_bytes=112 * _GIB,
            usd_per_hour=4.20,
        ),
        Chip(
            name="v6e",
            platform="tpu",
            device_kind="TPU v6",
            topology="v6e",
            bf16_flops=918 * _T,
            int8_flops=1836 * _T,
            memory_bytes=31.24 * _GIB,
            memory_bandwidth=1640 * _G,
            link_bandwidth=400 * _G,
            network_bandwidth=12.5 * _G,
            host_bytes=180 * _GIB,
            usd_per_hour=2.70,
        ),
        Chip(
            name="tpu7x",
            platform="tpu",
            device_kind="TPU7x",
            topology="tpu7x",
            bf16_flops=2307 * _T,
            float8_flops=4614 * _T,
            memory_bytes=192 * _GIB,
            memory_bandwidth=7380 * _G,
            link_bandwidth=600 * _G,
            network_bandwidth=12.5 * _G,
            host_bytes=240 * _GIB,
            devices=2,
        ),
        _H100,
        dataclasses.replace(
            _H100, name="h200", device_kind="H200", memory_bytes=139 * _GIB, memory_bandwidth=4800 * _G
        ),
        Chip(
            name="a100",
            platform="cuda",
            device_kind="A100",
            bf16_flops=312 * _T,
            memory_bytes=79.1 * _GIB,
            memory_bandwidth=2039 * _G,
            link_bandwidth=300 * _G,
            network_bandwidth=25 * _G,
            host_bytes=250 * _GIB,
            host_bandwidth=32 * _G,
        ),
    )
}


def of_device(device_kind: str) -> Chip | None:
    """The chip behind a jax device, or None for one without a data sheet here, such as a CPU."""
    return next((chip for chip in CHIPS.values() if chip.device_kind in device_kind), None)
