"""A profile of a step, read with jax's own reader: seconds by what they were spent on, and the largest kernels."""

import collections
from pathlib import Path
from typing import Any

import jax

# What kernels are called by cuDNN, by cuBLAS and by XLA's own compilers; the first that matches counts
KINDS = (
    ("attention", ("fmha", "flash", "sdpa", "cudnn")),
    ("matrix products", ("gemm", "nvjet", "cutlass", "xmma", "dot")),
    ("copies", ("memcpy", "memset", "copy")),
)


def kind_of(kernel: str) -> str:
    """What a kernel does, by its name."""
    return next((kind for kind, names in KINDS if any(n in kernel.lower() for n in names)), "all else")


def read(folder: Path, seconds: float) -> dict[str, Any]:
    """Kernels of the newest trace in a folder, summed by name and by kind.

    Args:
      seconds: that the step took without a profile; what kernels do not fill of it the device waited.
    """
    newest = max(folder.glob("**/*.xplane.pb"), key=lambda path: path.stat().st_mtime)
    totals: collections.Counter[str] = collections.Counter()
    for plane in jax.profiler.ProfileData.from_file(str(newest)).planes:
        if not plane.name.startswith("/device:GPU"):
            continue
        for line in plane.lines:
            if line.name.startswith("Stream"):
                for event in line.events:
                    totals[event.name] += event.duration_ns
    kinds: collections.Counter[str] = collections.Counter()
    for name, duration in totals.items():
        kinds[kind_of(name)] += duration
    busy = sum(totals.values()) / 1e9
    return {
        "step_s": seconds,
        "busy_s": busy,  # streams that overlap count each
        "waiting_s": max(0.0, seconds - busy),
        "by_kind_s": {kind: duration / 1e9 for kind, duration in kinds.most_common()},
        "largest": [[name[:120], duration / 1e9] for name, duration in totals.most_common(12)],
    }


def losses(profile: dict[str, Any], ideal_s: dict[str, float]) -> list[tuple[str, float]]:
    """What the step loses against the ideal, largest first: seconds above what each kind needs at the measured peak.

    Args:
      ideal_s: by kind; a kind that is absent should not be there at all.
    """
    spent = profile["by_kind_s"] | {"waiting": profile["waiting_s"]}
    lost = [(kind, seconds - ideal_s.get(kind, 0.0)) for kind, seconds in spent.items()]
    return sorted(lost, key=lambda item: -item[1])
