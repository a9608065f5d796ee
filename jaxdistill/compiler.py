"""Options of XLA's compiler by generation of TPU: the trainer and the planner compile with the same ones."""

from collections.abc import Mapping
from typing import Any

from jaxdistill import chips

_OFFLOADED = ("all_gather", "reduce_scatter", "all_reduce")
_SPARSE_CORE = {f"xla_tpu_enable_sparse_core_collective_offload_{kind}": "true" for kind in _OFFLOADED}

# v5e has no SparseCores, and its compiler overlaps collectives with products by itself; tpu7x uses them unasked.
OPTIONS: Mapping[str, Mapping[str, str]] = {
    "v5p": _SPARSE_CORE,
    "v6e": _SPARSE_CORE,
}


def options(device: Any) -> dict[str, str]:
    """What to compile a program for this device with; nothing for those without an entry."""
    chip = chips.of_device(device.device_kind)
    return dict(OPTIONS.get(chip.name, {})) if chip else {}
