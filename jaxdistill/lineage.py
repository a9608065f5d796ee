"""From an evaluation back to the problems: run folders linked by the hashes of what each read from the others."""

import dataclasses
import functools
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from jaxdistill import manifest, sources
from jaxdistill.errors import UserError

Found = Literal["same", "changed", "missing", "remote"]  # what is there now; a URL is not looked at
_BASE, _CHECKPOINTS = "base", "checkpoints"  # of a training phase's folder


@dataclasses.dataclass(frozen=True, kw_only=True)
class Input:
    """What a stage read: a file, a folder, or the weights of a model."""

    recorded: str  # path as the manifest has it
    path: Path  # where it is now; as recorded if it is nowhere
    found: Found
    maker: Path | None  # folder of the stage that holds it; None for what came from outside


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stage:
    """One run folder."""

    folder: Path
    manifest: Mapping[str, Any]
    inputs: tuple[Input, ...]

    @property
    def command(self) -> str:
        return self.manifest["command"]

    @property
    def config(self) -> dict[str, Any]:
        """The resolved configuration; empty where the command leaves none."""
        if self.command == "export":  # whose config.json is the model's
            return self.manifest["settings"]
        path = self.folder / "config.json"
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}

    @property
    def counts(self) -> dict[str, int]:
        """Rows by what became of them; of training, examples and steps of each phase."""
        phases = self.manifest.get("phases", {})
        of_phases = {f"{name} {what}": phase[what] for name, phase in phases.items() for what in ("examples", "steps")}
        return {**self.manifest["counts"], **of_phases}

    @property
    def cost_usd(self) -> float | None:
        """What the teacher's answers cost; None for stages that ask none."""
        return self.manifest.get("cost_usd")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Lineage:
    """Stages by folder, each after those it read from."""

    roots: tuple[Path, ...]  # the folders that were asked about
    stages: Mapping[Path, Stage]

    def of(self, *commands: str) -> list[Stage]:
        """The stages of these commands."""
        return [stage for stage in self.stages.values() if stage.command in commands]

    def behind(self, stage: Stage) -> list[Stage]:
        """The stage and all that it stands on, sources first."""
        wanted, left = set(), [stage.folder]
        while left:
            folder = left.pop()
            if folder not in wanted:
                wanted.add(folder)
                left += [i.maker for i in self.stages[folder].inputs if i.maker is not None]
        return [stage for folder, stage in self.stages.items() if folder in wanted]

    def name(self, path: Path) -> str:
        """A path as people are shown it: from the folder that was asked about."""
        for root in self.roots:
            if path == root:
                return root.name
            if path.is_relative_to(root):
                return str(path.relative_to(root))
        return str(path)

    @property
    def gaps(self) -> list[str]:
        """Where the way back ends too early: inputs that are not what was read, and examples that no stage made."""
        found = []
        for stage in self.stages.values():
            where = self.name(stage.folder)
            for i in stage.inputs:
                if i.found != "same":
                    found.append(f"{where} read {i.recorded}, which is {i.found}")
                elif (
                    i.maker is None
                    and stage.command in ("train", "examples")
                    and i.path.suffix in (".jsonl", ".parquet")
                ):
                    found.append(f"{where} read {i.recorded}, which no stage wrote")
        return found


def trace(runs: Sequence[Path]) -> Lineage:
    """Reads the manifests in and under the run folders, and of all folders that their inputs come from.

    A file belongs to the nearest folder above it that has a manifest; it is what a stage read if its hash is the one
    in that stage's manifest. A run that was moved is found again by the ends of its paths.

    Raises:
      UserError: a folder has no manifest in or under it, or one cannot be read.
    """
    roots = tuple(run.resolve() for run in runs)
    left: list[Path] = []
    for run, root in zip(runs, roots, strict=True):
        folders = sorted(path.parent for path in root.rglob("manifest.json") if _is_manifest(path))
        if not folders:
            raise UserError(f"{run}: no run folder; expected one with a manifest.json in it or below")
        left += folders
    stages: dict[Path, Stage] = {}
    fingerprint = functools.cache(manifest.fingerprint)
    while left:
        folder = left.pop(0)
        if folder not in stages:
            stages[folder] = _stage(folder, roots, fingerprint)
            left += [i.maker for i in stages[folder].inputs if i.maker is not None]
    return Lineage(roots=roots, stages={folder: stages[folder] for folder in _in_order(stages)})


def _is_manifest(path: Path) -> bool:
    """Whether it is that of a stage; other tools write files of that name too."""
    return {"command", "written", "inputs", "counts"} <= _read(path).keys()


def _read(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path}: not valid JSON ({error}); run its command again to write it anew") from None
    return values if isinstance(values, dict) else {}


def _in_order(stages: Mapping[Path, Stage]) -> Iterator[Path]:
    """Folders, each after those it read from; as far as possible in the order in which they were written."""
    done: set[Path] = set()

    def visit(folder: Path) -> Iterator[Path]:
        if folder in done:
            return
        done.add(folder)
        for i in stages[folder].inputs:
            if i.maker is not None:
                yield from visit(i.maker)
        yield folder

    for folder in sorted(stages, key=lambda folder: (stages[folder].manifest["written"], str(folder))):
        yield from visit(folder)


def _stage(folder: Path, roots: tuple[Path, ...], fingerprint: Callable[[Path], Any]) -> Stage:
    values = _read(folder / "manifest.json")
    inputs = [_input(name, recorded, folder, roots, fingerprint) for name, recorded in values["inputs"].items()]
    weights = values.get("model")
    if isinstance(weights, str):
        inputs += [_weights(i, weights, folder) for i in inputs if i.path.name == "config.json"]
    return Stage(folder=folder, manifest=values, inputs=tuple(inputs))


def _input(
    name: str, recorded: Any, folder: Path, roots: tuple[Path, ...], fingerprint: Callable[[Path], Any]
) -> Input:
    if sources.is_remote(Path(name)):
        return Input(recorded=name, path=Path(name), found="remote", maker=None)
    there = [path for path in _places(Path(name), folder, roots) if path.exists()]
    same = next((path for path in there if fingerprint(path) == recorded), None)
    path = same or (there[0] if there else Path(name))
    found: Found = "same" if same else "changed" if there else "missing"
    return Input(recorded=name, path=path, found=found, maker=_maker(path, folder) if there else None)


def _places(path: Path, folder: Path, roots: tuple[Path, ...]) -> Iterator[Path]:
    """Where an input may be now: under a folder that was asked about, as recorded, or relative to a folder above."""
    parts = path.parts[path.is_absolute() :]
    for root in roots:
        yield from (root.joinpath(*parts[i:]) for i in range(len(parts)))
    yield path.absolute()
    if not path.is_absolute():
        yield from (above / path for above in folder.parents)


def _maker(path: Path, reader: Path) -> Path | None:
    """The nearest run folder above an input, unless that is the reader's own: what a stage reads of itself it made."""
    for above in (path, *path.parents):
        if (above / "manifest.json").is_file() and _is_manifest(above / "manifest.json"):
            return above if above != reader else None
    return None


def _weights(config: Input, recorded: str, folder: Path) -> Input:
    """The weights beside a config.json, compared with the fingerprint that the stage took of what it read."""
    model = config.path.parent.parent if config.path.parent.name == _BASE else config.path.parent
    step = re.match(r"step (\d+) ", recorded)
    held = model / _CHECKPOINTS / step[1] if step else model
    files = [path for path in held.rglob("*") if path.is_file()] if step else list(model.glob("*.safetensors"))
    found: Found = "missing"
    if files and config.path.is_file():
        now = manifest.weights_fingerprint(config.path, held, sorted(files))
        found = "same" if recorded.endswith(now) else "changed"
    return Input(recorded=f"weights of {config.recorded}", path=held, found=found, maker=config.maker)
