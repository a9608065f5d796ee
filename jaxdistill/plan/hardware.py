"""Accelerators by name: what one chip can do, and how many a name stands for."""

import dataclasses
import math
import re
from collections.abc import Mapping

from jaxdistill.errors import UserError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chip:
    """One chip by its maker's data sheet. Bandwidths are one way, of one chip."""

    name: str
    platform: str  # of jax: "tpu" or "cuda"
    topology: str  # what jax calls the generation when it compiles ahead of time
    bf16_flops: float  # FLOP/s, dense
    memory_bytes: float  # that programs can use
    memory_bandwidth: float  # bytes/s
    link_bandwidth: float  # bytes/s within a slice or a node, over all links
    network_bandwidth: float  # bytes/s between slices or nodes
    host_bytes: float  # host memory that falls to one chip
    devices: int = 1  # of jax in one chip
    usd_per_hour: float | None = None  # on demand, list price of 2025; prices differ by region and contract


_GIB, _G, _T = 2.0**30, 1e9, 1e12
CHIPS: Mapping[str, Chip] = {
    chip.name: chip
    for chip in (
        Chip(
            name="v4",
            platform="tpu",
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
            topology="v5e",
            bf16_flops=197 * _T,
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
            topology="v5",
            bf16_flops=459 * _T,
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
            topology="v6e",
            bf16_flops=918 * _T,
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
            topology="tpu7x",
            bf16_flops=2307 * _T,
            memory_bytes=192 * _GIB,
            memory_bandwidth=7380 * _G,
            link_bandwidth=600 * _G,
            network_bandwidth=12.5 * _G,
            host_bytes=240 * _GIB,
            devices=2,
        ),
        Chip(
            name="h100",
            platform="cuda",
            topology="h100",
            bf16_flops=989.5 * _T,
            memory_bytes=79.1 * _GIB,
            memory_bandwidth=3350 * _G,
            link_bandwidth=450 * _G,
            network_bandwidth=50 * _G,
            host_bytes=250 * _GIB,
            usd_per_hour=3.00,
        ),
    )
}
GPUS_PER_NODE = 8

# Google's names for TPU slices: shapes by what the number in the name counts. v4 and v5p count TensorCores, two a chip.
_CORES_3D = {
    8: (2, 2, 1),
    16: (2, 2, 2),
    32: (2, 2, 4),
    64: (2, 4, 4),
    128: (4, 4, 4),
    256: (4, 4, 8),
    512: (4, 8, 8),
    1024: (8, 8, 8),
    2048: (8, 8, 16),
    4096: (8, 16, 16),
}
_CHIPS_2D = {1: (1, 1), 4: (2, 2), 8: (2, 4), 16: (4, 4), 32: (4, 8), 64: (8, 8), 128: (8, 16), 256: (16, 16)}
ACCELERATOR_TYPES: Mapping[str, Mapping[int, tuple[int, ...]]] = {
    "v4": _CORES_3D,
    "v5p": _CORES_3D,
    "v5e": _CHIPS_2D,
    "v5litepod": _CHIPS_2D,
    "v6e": _CHIPS_2D,
}
_DIMENSIONS = {"v4": 3, "v5p": 3, "v5e": 2, "v6e": 2, "tpu7x": 3}
_EXPECTED = "expected a topology (v5p:4x8x8, v5e:4x4, v6e:8x8, tpu7x:4x4x4), Google's name of one (v5p-512) or h100x8"


@dataclasses.dataclass(frozen=True)
class Hardware:
    """Chips of one kind, wired together."""

    chip: Chip
    shape: tuple[int, ...]  # of the torus; (nodes, GPUs a node)

    @property
    def chips(self) -> int:
        return math.prod(self.shape)

    @property
    def devices(self) -> int:
        """What jax sees."""
        return self.chips * self.chip.devices

    def __str__(self) -> str:
        shape = "x".join(map(str, self.shape))
        return f"{self.chip.name} {shape}, {self.chips} chip{'s' * (self.chips != 1)}"


def parse(name: str) -> Hardware:
    """The hardware that a name stands for.

    Raises:
      UserError: no such accelerator, size or shape.
    """
    if gpu := re.fullmatch(r"h100(?:x(\d+))?", name):
        count = int(gpu[1] or 1)
        nodes, rest = divmod(count, GPUS_PER_NODE)
        if count > GPUS_PER_NODE and rest:
            raise UserError(f"{name}: {count} GPUs are no whole nodes; expected a multiple of {GPUS_PER_NODE}")
        if not count:
            raise UserError(f"{name}: {_EXPECTED}")
        return Hardware(CHIPS["h100"], (max(nodes, 1), min(count, GPUS_PER_NODE)))
    if slice_ := re.fullmatch(r"(\w+)-(\d+)", name):
        shapes = ACCELERATOR_TYPES.get(slice_[1])
        if shapes is None:
            raise UserError(f"{name} is no accelerator known here; {_EXPECTED}")
        if int(slice_[2]) not in shapes:
            sizes = ", ".join(f"{slice_[1]}-{size}" for size in shapes)
            raise UserError(f"{name}: there is no slice of that size; expected {sizes}, or a topology as in v5p:4x4x12")
        kind = "v5e" if slice_[1] == "v5litepod" else slice_[1]
        return Hardware(CHIPS[kind], shapes[int(slice_[2])])
    if topology := re.fullmatch(r"(\w+):(\d+(?:x\d+)+)", name):
        kind, shape = topology[1], tuple(map(int, topology[2].split("x")))
        if kind not in _DIMENSIONS:
            raise UserError(f"{name} is no accelerator known here; {_EXPECTED}")
        if len(shape) != _DIMENSIONS[kind] or not all(shape):
            raise UserError(f"{name}: {kind} has {_DIMENSIONS[kind]} dimensions; {_EXPECTED}")
        return Hardware(CHIPS[kind], shape)
    raise UserError(f"{name!r} is no hardware; {_EXPECTED}")
