"""Whether the sampler's host work hides behind the device's: read from a trace of the profiler.

    .venv/bin/python benchmarks/overlap.py [--requests 64] [--at-once 32] [--mean-tokens 64]

SmolLM2-135M-Instruct, requests as in benchmarks/sampling.py. Host work is the time inside `Engine.step` that does not
wait for tokens; the tracer notes every Python call, so it looks slower than it is. The device works while any compiled
program of the engine runs: on a CPU on threads of its own. Hidden = host work during which the device works / all host
work. The trace itself, for XProf or Perfetto, is in the folder that is printed.
"""

import argparse
import os
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import sampling
import smollm2

from jaxdistill import hf
from jaxdistill.sample.engine import Engine, EngineConfig
from jaxdistill.sharding import MeshConfig

Span = tuple[float, float]  # nanoseconds


def union(spans: Iterable[Span]) -> list[Span]:
    """The same time, in spans that are apart and in order."""
    apart: list[Span] = []
    for start, end in sorted(spans):
        if apart and start <= apart[-1][1]:
            apart[-1] = apart[-1][0], max(apart[-1][1], end)
        else:
            apart.append((start, end))
    return apart


def without(spans: list[Span], taken: list[Span]) -> list[Span]:
    """What of `spans` is in no span of `taken`; both apart and in order."""
    left = []
    for start, end in spans:
        for first, last in taken:
            if first < end and last > start:
                if first > start:
                    left.append((start, first))
                start = max(start, last)
        if start < end:
            left.append((start, end))
    return left


def seconds(spans: list[Span]) -> float:
    return sum(end - start for start, end in spans) / 1e9


def events(folder: Path) -> Iterator[tuple[str, str, str, Span]]:
    """Plane, line, name and span of everything in the newest trace of a folder."""
    newest = max(folder.glob("**/*.xplane.pb"), key=lambda path: path.stat().st_mtime)
    for plane in jax.profiler.ProfileData.from_file(str(newest)).planes:
        for line in plane.lines:
            for event in line.events:
                yield plane.name, line.name, event.name, (event.start_ns, event.start_ns + event.duration_ns)


def runs_program(plane: str, line: str, name: str) -> bool:
    """Whether an event is a compiled program at work on a device."""
    if plane.startswith("/device:"):
        return line == "XLA Modules" or line.startswith("Stream")
    return line.startswith("tf_XLAPjRtCpuClient") and name.startswith("ThunkExecutor::Execute")


def read(folder: Path) -> dict[str, Any]:
    """Seconds that host and device work, and how they lie to each other."""
    steps, waits, device = [], [], []
    for plane, line, name, span in events(folder):
        if runs_program(plane, line, name):
            device.append(span)
        elif line.startswith("python") and name.startswith("$engine.py") and name.endswith(" step"):
            steps.append(span)
        elif line.startswith("python") and name == "$numpy asarray":
            waits.append(span)
    if not steps or not device:
        raise SystemExit(f"{folder}: expected steps of the engine and programs on a device; found neither or one")
    steps_apart, device = union(steps), union(device)
    wall = [(steps_apart[0][0], steps_apart[-1][1])]
    host = without(steps_apart, union(waits))
    alone = without(host, device)
    return {
        "steps": len(steps),
        "wall_s": seconds(wall),
        "device_s": seconds(wall) - seconds(without(wall, device)),
        "host_s": seconds(host),
        "hidden": 1 - seconds(alone) / seconds(host),
    }


def main() -> None:
    """Traces, and prints what the trace says."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--at-once", type=int, default=32)
    parser.add_argument("--mean-tokens", type=int, default=64)
    arguments = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="jaxdistill-trace-"))
    with jax.set_mesh(MeshConfig().build()):
        params, c = hf.load(smollm2.folder())
        how = EngineConfig(slots=arguments.at_once, compute_dtype="float32", prefill_tokens=64)
        engine = Engine(params, c, (), sampling.POSITIONS, how)
        del params
        sampling.ours(engine, sampling.requests(2, 16, c.vocab))
        asked = sampling.requests(arguments.requests, arguments.mean_tokens, c.vocab)
        with jax.profiler.trace(str(folder)):
            sampling.ours(engine, asked)
    found = read(folder)
    device, host, wall = found["device_s"], found["host_s"], found["wall_s"]
    print(f"{found['steps']} steps in {wall:.1f} s; trace in {folder}")
    waits_ms = (wall - device) / found["steps"] * 1e3
    print(f"the device works {device:.2f} s, {device / wall:.1%}; it waits {waits_ms:.2f} ms a step")
    print(f"the host works {host:.2f} s, {host / found['steps'] * 1e3:.2f} ms a step; hidden {found['hidden']:.1%}")


if __name__ == "__main__":
    main()
