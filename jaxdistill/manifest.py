"""What every command leaves in its run folder: config.json, and manifest.json with inputs, versions, commit, counts."""

import contextlib
import dataclasses
import fcntl
import hashlib
import importlib.metadata
import json
import os
import platform
import subprocess
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from jaxdistill import sources
from jaxdistill.errors import UserError
from jaxdistill.records import SCHEMA

_PACKAGES = (
    "jaxdistill",
    "jax",
    "jaxlib",
    "libtpu",
    "jax-cuda13-plugin",
    "nvidia-cudnn-cu13",
    "tokamax",
    "flax",
    "optax",
    "orbax-checkpoint",
    "grain",
    "transformers",
    "httpx2",
    "genai-prices",
    "math-verify",
)
_EDGE_BYTES = 1 << 18  # read of each end of a file of weights


def file_hash(path: Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal."""
    with sources.open_file(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def commit() -> str:
    """The checkout's commit, with `+changes` if files differ from it; `unknown` outside a checkout."""
    here = Path(__file__).parent
    try:
        _git(here, "ls-files", "--error-unmatch", Path(__file__).name)  # not some checkout around an installed copy
        head = _git(here, "rev-parse", "HEAD")
        return head + ("+changes" if _git(here, "status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _git(folder: Path, *words: str) -> str:
    return subprocess.run(["git", *words], cwd=folder, check=True, capture_output=True, text=True).stdout.strip()


@contextlib.contextmanager
def held(workdir: Path) -> Iterator[None]:
    """Holds a run folder for this process: two writers would mix their files.

    Raises:
      UserError: another process holds it, or there can be no such folder.
    """
    made = not workdir.exists()
    try:
        workdir.mkdir(parents=True, exist_ok=True)
    except FileNotFoundError as error:  # in /proc, say; all else is explained by the command line
        raise UserError(f"{error.filename}: no folder can be made here; choose another workdir") from None
    handle = os.open(workdir, os.O_RDONLY)  # the folder itself is locked: no file to leave behind
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{workdir} is in use by another process; wait for it, or choose another workdir") from None
        yield
    finally:
        os.close(handle)
        if made and not any(workdir.iterdir()):
            workdir.rmdir()  # a command that was refused leaves nothing


class History:
    """Seconds worked and commits used on a run folder, over all calls that worked on it (`history.json`).

    Commits are written down at once; of a call that is killed the seconds since its last `keep` are lost.
    """

    def __init__(self, workdir: Path):
        self._path = workdir / "history.json"
        earlier = json.loads(self._path.read_text(encoding="utf-8")) if self._path.is_file() else {}
        self._seconds: float = earlier.get("wall_s", 0.0)
        self.commits: list[str] = list(dict.fromkeys([*earlier.get("commits", []), commit()]))
        self._started = time.monotonic()
        self.keep()

    @property
    def wall_s(self) -> float:
        """Seconds so far."""
        return self._seconds + time.monotonic() - self._started

    def keep(self) -> None:
        """Writes it down."""
        write_json(self._path, {"wall_s": round(self.wall_s, 1), "commits": self.commits})


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
    """Writes `workdir/manifest.json`; input files are hashed, input folders by their file names and sizes.

    Args:
      inputs: what was read; a mapping holds the `fingerprint` of each, which is then not taken again.
    """
    known = inputs if isinstance(inputs, Mapping) else {path: fingerprint(path) for path in inputs}
    write_json(
        workdir / "manifest.json",
        {
            "schema": SCHEMA,
            "command": command,
            "written": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "commit": commit(),
            "versions": versions(),
            "inputs": {sources.name(path): found for path, found in known.items()},
            "counts": dict(counts),
            **facts,
        },
    )


def decontamination(evaluation_sets: Iterable[Path]) -> dict[str, str]:
    """SHA-256 of each evaluation file by its name: what a manifest says its rows were checked against."""
    return {sources.name(path): file_hash(path) for path in evaluation_sets}


def cleared_of(path: Path) -> frozenset[str]:
    """Hashes of the evaluation files that a file's rows were checked against, by the manifests they came through.

    A run folder's manifest names its inputs; the search goes back through these to the command that made the check.
    What has no manifest, or changed since, was checked against nothing.
    """
    manifest = path.parent / "manifest.json"
    if sources.wrong(manifest):
        return frozenset()
    with sources.open_file(manifest) as file:
        record = json.load(file)
    if record.get("decontaminated"):
        return frozenset(record["decontaminated"].values())
    checked: frozenset[str] | None = None
    for name, recorded in record.get("inputs", {}).items():
        source = Path(name)
        if source == path or fingerprint(source) != recorded:
            return frozenset()
        found = cleared_of(source)
        checked = found if checked is None else checked & found
    return checked or frozenset()


def fingerprint(path: Path) -> Any:
    """What a manifest says of an input: the hash of a file, the names and sizes of a folder's files, or `missing`."""
    if path.is_dir():
        return {str(p.relative_to(path)): p.stat().st_size for p in sorted(path.rglob("*")) if p.is_file()}
    return "missing" if sources.wrong(path) else "sha256:" + file_hash(path)


def weights_fingerprint(config: Path, folder: Path, files: Iterable[Path]) -> str:
    """Names weights without reading all of them.

    A digest of config.json and of the files' names, sizes, first and last bytes: a copy of a model is the same model,
    and training changes every part of every file.
    """
    digest = hashlib.sha256(config.read_bytes())
    for path in files:
        size = path.stat().st_size
        digest.update(f"{path.relative_to(folder)}\0{size}\n".encode())
        with path.open("rb") as file:
            digest.update(file.read(_EDGE_BYTES))
            file.seek(max(0, size - _EDGE_BYTES))
            digest.update(file.read())
    return f"sha256:{digest.hexdigest()}"
