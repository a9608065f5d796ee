"""What is claimed of one H100, measured: attention, the ceilings, decoding, MFU by shape, the peer, and a profile.

    benchmarks/gpu.sh [--smoke] [--out FOLDER] [--budget-s 570] [--parts PART ...] [--models MODEL ...] [--rows ...]

Every part is a process of its own, so that one which fails or runs out of memory loses no other; parts that the budget
leaves no time for are named as skipped, and another call takes them up: what a folder holds already is not repeated.
Writes gpu.json and gpu.md to the folder: $OUT, or benchmarks/results.
"""

import argparse
import dataclasses
import importlib.metadata
import importlib.util
import itertools
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import report
import shapes

from jaxdistill import manifest

HERE = Path(__file__).parent
PARTS = ("attention", "peak", "decode", "step", "peer")
_DECODED = ("1.5B", "smoke")  # models whose caches fit one GPU: 64 contexts of 32,768 are 60 GB of the smallest
_LONGEST_DECODED = 32_768
_LEAST_S = 20  # seconds left below which no part is started
_CACHE = "/tmp/jaxdistill-gpu-cache"  # of compiled programs: a second call on a warm machine starts at once


@dataclasses.dataclass(frozen=True)
class Part:
    """One process."""

    name: str
    command: tuple[str, ...]
    needs: str  # the package without which it is skipped


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Runs the parts and writes the report; returns what gpu.json holds."""
    options = _options(arguments)
    folder: Path = options.out
    folder.mkdir(parents=True, exist_ok=True)
    ends, path = time.monotonic() + options.budget_s, folder / "gpu.json"
    found: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {"results": {}}
    found["environment"], found["skipped"] = _environment(), {}
    for part in _parts(options, folder):
        left = ends - time.monotonic()
        if part.name in found["results"]:
            print(f"{part.name}: measured before", flush=True)
            continue
        reason = _unable(part, left, options.smoke) or _run(part, folder, left)
        if reason:
            found["skipped"][part.name] = reason
            print(f"{part.name}: {reason}", flush=True)
        else:
            found["results"][part.name] = json.loads(_output(part, folder).read_text())
            print(f"{part.name}: done, {ends - time.monotonic():.0f} s left", flush=True)
        path.write_text(json.dumps(found, indent=1) + "\n")
        (folder / "gpu.md").write_text(report.markdown(found))
    print(report.markdown(found))
    return found


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    out = Path(os.environ.get("OUT") or HERE.parent / "results")
    parser.add_argument("--out", type=Path, default=out, help="folder of gpu.json and gpu.md")
    parser.add_argument("--budget-s", type=float, default=570, help="seconds for everything")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--models", nargs="+", choices=list(shapes.MODELS), default=list(shapes.MODELS))
    parser.add_argument("--rows", nargs="+", type=int, default=list(shapes.ROWS), help="tokens")
    parser.add_argument("--smoke", action="store_true", help="a tiny model on whatever device there is")
    return parser.parse_args(arguments)


def _parts(options: argparse.Namespace, folder: Path) -> list[Part]:
    """What is to run, the most telling first: should time run out, the others are left for the next call."""
    smoke, memory = ("--smoke",) if options.smoke else (), str(_memory_gib())
    found = [Part(name, (f"{name}.py", *smoke), "jax") for name in ("attention", "peak") if name in options.parts]
    models, rows = (["smoke"], [256]) if options.smoke else (options.models, options.rows)
    if "decode" in options.parts:
        for model, row in itertools.product(models, rows):
            if model in _DECODED and row <= _LONGEST_DECODED:
                shape = ("--model", model, "--row", str(row), "--memory-gib", memory)
                found.append(Part(f"decode {model} {row}", ("decode.py", *shape), "jax"))
    for model in models:
        for row in rows:
            shape = ("--model", model, "--row", str(row), "--memory-gib", memory)
            if "step" in options.parts:
                profile = ("--profile", str(folder / f"profile-{row}")) if model == models[0] else ()
                found.append(Part(f"step {model} {row}", ("step.py", *shape, *profile), "jax"))
            if "peer" in options.parts:
                found.append(Part(f"peer {model} {row}", ("peer.py", *shape), "torch"))
    return found


def _unable(part: Part, left: float, smoke: bool) -> str | None:
    """Why a part cannot run here."""
    if importlib.util.find_spec(part.needs) is None:
        return f"{part.needs} is not installed"
    if left < _LEAST_S:
        return "no time was left"
    has = {"jax": "jax_cuda13_plugin", "torch": "torch.version"}[part.needs]
    if not smoke and (importlib.util.find_spec(has) is None or not Path("/dev/nvidiactl").exists()):
        return f"{part.needs} finds no NVIDIA GPU here"
    return None


def _run(part: Part, folder: Path, left: float) -> str | None:
    """Runs a part; returns why it failed."""
    environment = os.environ | {
        "XLA_PYTHON_CLIENT_MEM_FRACTION": "0.95",
        "JAX_COMPILATION_CACHE_DIR": _CACHE,
        "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True",
        "TORCHINDUCTOR_CACHE_DIR": f"{_CACHE}-torch",
    }
    output = _output(part, folder)
    output.unlink(missing_ok=True)
    script, *rest = part.command
    command = [sys.executable, str(HERE / script), *rest, "--out", str(output)]
    try:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=left, check=False)
    except subprocess.TimeoutExpired:
        return "cut off when the time was up"
    if done.returncode == 0:
        return None
    lines = [line for line in done.stderr.splitlines() if line.strip()] or ["without a word"]
    (folder / f"{output.stem}.log").write_text(done.stdout + done.stderr)
    return f"failed: {lines[-1][:300]} ({output.stem}.log)"


def _output(part: Part, folder: Path) -> Path:
    return folder / f"part-{part.name.replace(' ', '-')}.json"


def _memory_gib() -> float:
    """Of the GPU, by which both sides choose how many layers a model has; a little where there is none."""
    smi = ["nvidia-smi", "--query-gpu=memory.total", "--format=csv,noheader,nounits"]
    try:
        return float(subprocess.run(smi, capture_output=True, text=True, check=True).stdout.split()[0]) / 1024
    except (OSError, subprocess.CalledProcessError):
        return 8.0


def _environment() -> dict[str, Any]:
    smi = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]
    try:
        device = subprocess.run(smi, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        device = "no NVIDIA GPU"
    names = ("jax", "jaxlib", "jax-cuda13-plugin", "nvidia-cudnn-cu13", "torch", "transformers", "flash-attn")
    installed = {dist.name.lower(): dist.version for dist in importlib.metadata.distributions()}
    return {
        "commit": manifest.commit(),
        "device": device,
        "python": sys.version.split()[0],
        "versions": {name: installed[name] for name in names if name in installed},
    }


if __name__ == "__main__":
    main()
