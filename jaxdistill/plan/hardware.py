"""Accelerators by name: which chip a name means, how many of them, and how they are wired."""

import dataclasses
import math
import re
from collections.abc import Mapping

from jaxdistill.chips import CHIPS, Chip
from jaxdistill.errors import UserError

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

    @property
    def device_memory(self) -> float:
        """Bytes that programs can use on one of jax's devices."""
        return self.chip.memory_bytes / self.chip.devices

    @property
    def device_host_memory(self) -> float:
        """Bytes of host memory that fall to one of jax's devices."""
        return self.chip.host_bytes / self.chip.devices

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
