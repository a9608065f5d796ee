"""What every command leaves in its run folder: config.json, and manifest.json with inputs, versions, commit, counts."""

import dataclasses
import hashlib
import importlib.metadata
import json
import platform
import subprocess
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from jaxdistill.records import SCHEMA

_PACKAGES = (
    "jaxdistill",
    "jax",
    "jaxlib",
    "flax",
    "optax",
    "orbax-checkpoint",
    "grain",
    "transformers",
    "openai",
    "math-verify",
)


def file_hash(path: Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def commit() -> str:
    """The checkout's commit, with `+changes` if files differ from it; `unknown` outside a checkout."""
    here = Path(__file__).parent
    try:
        head = _git(here, "rev-parse", "HEAD")
        return head + ("+changes" if _git(here, "status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _git(folder: Path, *words: str) -> str:
    return subprocess.run(["git", *words], cwd=folder, check=True, capture_output=True, text=True).stdout.strip()


def versions() -> dict[str, str]:
    """Versions of Python and of the packages whose behaviour the results depend on."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def write_json(path: Path, value: Any) -> None:
    """Writes JSON that appears whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(value, indent=2, ensure_ascii=False, default=str) + "\n", encoding="utf-8")
    partial.replace(path)


def write_config(workdir: Path, config: Any) -> None:
    """Writes the resolved configuration of a command to `workdir/config.json`."""
    write_json(workdir / "config.json", dataclasses.asdict(config))


def write_manifest(
    workdir: Path, command: str, inputs: Iterable[Path], counts: Mapping[str, Any], **facts: Any
) -> None:
    """Writes `workdir/manifest.json`; input files are hashed, input folders by their file names and sizes."""
    write_json(
        workdir / "manifest.json",
        {
            "schema": SCHEMA,
            "command": command,
            "written": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "commit": commit(),
            "versions": versions(),
            "inputs": {str(path): _fingerprint(path) for path in inputs},
            "counts": dict(counts),
            **facts,
        },
    )


def _fingerprint(path: Path) -> Any:
    if path.is_dir():
        return {str(p.relative_to(path)): p.stat().st_size for p in sorted(path.rglob("*")) if p.is_file()}
    return "sha256:" + file_hash(path) if path.is_file() else "missing"
