"""`jaxdistill launch`: one description of a run -> the file that starts it on Slurm, Kubernetes, TPU VMs or a cloud."""

import dataclasses
import re
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, get_args

import jinja2
from rich.console import Console

from jaxdistill import manifest
from jaxdistill.errors import MISTAKE, PREEMPTED, UserError
from jaxdistill.plan import hardware
from jaxdistill.plan.hardware import Hardware

Target = Literal["slurm", "jobset", "tpu-vm", "xpk", "skypilot"]

PORT = 8476  # of the coordinator, process 0; jax's own default on Cloud TPUs
_TPU_HOST_CHIPS = 4
_ONE_HOST_CHIPS = {"v5e": 8, "v6e": 8}  # slices up to this size can be one host


@dataclasses.dataclass(frozen=True)
class _File:
    """What a target is given."""

    name: str
    start: str  # the command that takes it


_FILES: Mapping[Target, _File] = {
    "slurm": _File("slurm.sbatch", "sbatch {path}"),
    "jobset": _File("jobset.yaml", "kubectl apply -f {path}"),
    "tpu-vm": _File("tpu-vm.sh", "bash {path}"),
    "xpk": _File("xpk.sh", "bash {path}"),
    "skypilot": _File("skypilot.yaml", "sky jobs launch {path}"),
}


@dataclasses.dataclass(frozen=True)
class _Tpu:
    """How Google's services name one generation of TPUs."""

    accelerator: str  # label of GKE's nodes
    prefix: str = ""  # of the name of a slice: v5p of v5p-512; empty where none is known here
    cores: int = 1  # that the number in that name counts for each chip
    runtime: str = ""  # image of TPU VMs


_TPUS = {
    "v4": _Tpu("tpu-v4-podslice", "v4", 2, "tpu-ubuntu2204-base"),
    "v5e": _Tpu("tpu-v5-lite-podslice", "v5litepod", 1, "v2-alpha-tpuv5-lite"),
    "v5p": _Tpu("tpu-v5p-slice", "v5p", 2, "v2-alpha-tpuv5"),
    "v6e": _Tpu("tpu-v6e-slice", "v6e", 1, "v2-alpha-tpuv6e"),
    "tpu7x": _Tpu("tpu7x"),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job:
    """What a job is to have, whatever it runs. What a target does not use is ignored by it."""

    nodes: int = 1  # hosts; of TPUs all hosts of all slices
    hardware: str = "h100x8"  # of one node (h100x8), or of one TPU slice (v5p-512, v5p:4x8x8); cpu for none
    name: str = ""  # of the job; by default the recipe's
    setup: str = ""  # shell command before it on every host, such as "source .venv/bin/activate"
    hours: float = 24.0  # limit of one start; a requeued run has them again (slurm)
    grace_s: int = 300  # seconds between SIGTERM and the end, in which a checkpoint is saved
    max_restarts: int = 100  # after failures; a mistake in the input (exit code 2) is never started again
    partition: str = ""  # of the cluster (slurm)
    account: str = ""  # that pays (slurm)
    image: str = ""  # container with jaxdistill installed (jobset, xpk)
    claim: str = ""  # PersistentVolumeClaim that every host mounts at /runs, for the run folder (jobset)
    cluster: str = ""  # of GKE (xpk)
    project: str = ""  # of Google Cloud (tpu-vm, xpk)
    zone: str = ""  # of Google Cloud (tpu-vm, xpk)
    spot: bool = False  # cheaper machines that may be taken away (tpu-vm, xpk, skypilot)

    def __post_init__(self) -> None:
        if self.nodes < 1 or self.max_restarts < 0 or self.grace_s < 1 or not self.hours > 0:
            raise UserError(
                f"nodes is {self.nodes}, hours {self.hours}, grace_s {self.grace_s}, max_restarts {self.max_restarts}; "
                "expected 1 or more, more than 0, 1 or more, 0 or more"
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Array:
    """Runs of a sweep as one job of many tasks: one process each, with all devices of one node."""

    words: tuple[str, ...]  # of the command line of a task, to which `--run NAME` is added
    runs: tuple[str, ...]  # their names
    at_once: int = 0  # most tasks at a time; 0: as many as there is room for

    @property
    def command(self) -> str:
        """What a task runs, once the shell variable `run` holds its name."""
        return f'{shlex.join(self.words)} --run "$run"'


@dataclasses.dataclass(frozen=True, kw_only=True)
class LaunchConfig(Job):
    """One run, wherever it is to start."""

    target: Target
    recipe: Path  # of `jaxdistill train`, a path that holds on the machines that run it
    arguments: str = ""  # after the recipe on its command line: --arguments="--mesh.fsdp 8", with the =
    workdir: Path = Path("runs/launch")  # folder that the file is written to

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.recipe.is_file():
            raise UserError(f"{self.recipe}: no such recipe; expected a .py file with a function config()")
        if not re.fullmatch(r"[a-z]([-a-z0-9]{0,38}[a-z0-9])?", self.job):
            raise UserError(f"name is {self.job!r}; expected up to 40 of a-z, 0-9 and -, beginning with a letter")
        needed = {"jobset": ("image",), "xpk": ("image", "cluster"), "tpu-vm": ("zone",)}.get(self.target, ())
        if missing := [f"--{name}" for name in needed if not getattr(self, name)]:
            raise UserError(f"target {self.target} needs {' and '.join(missing)} (--help says what each is)")

    @property
    def job(self) -> str:
        """Name of the job."""
        return self.name or self.recipe.stem.lower().replace("_", "-")

    @property
    def command(self) -> str:
        """What every process runs.

        Raises:
          UserError: the arguments do not end their quotes.
        """
        try:
            words = shlex.split(self.arguments)
        except ValueError as error:
            raise UserError(f"arguments is {self.arguments!r}: {error}; expected words of a command line") from None
        return shlex.join(["jaxdistill", "train", str(self.recipe), *words])


@dataclasses.dataclass(frozen=True, kw_only=True)
class Machines:
    """The hosts of a run."""

    chip: Hardware | None  # of one node or one slice; None for CPUs
    slices: int  # groups of hosts that are wired together; of GPUs and CPUs one
    hosts: int  # of one slice
    chips_per_host: int

    @property
    def tpu(self) -> _Tpu | None:
        """Google's names, for TPUs."""
        return _TPUS[self.chip.chip.name] if self.chip and self.chip.chip.platform == "tpu" else None

    @property
    def topology(self) -> str:
        """The shape of a slice: 4x8x8."""
        return "x".join(map(str, self.chip.shape)) if self.chip else ""

    @property
    def slice_name(self) -> str:
        """Google's name of a slice: v5p-512."""
        return f"{self.tpu.prefix}-{self.chip.chips * self.tpu.cores}" if self.tpu and self.chip else ""


def machines(config: LaunchConfig) -> Machines:
    """The hosts that a description stands for.

    Raises:
      UserError: there is no such hardware, the target cannot start it, or nodes are no whole slices.
    """
    target, name = config.target, config.hardware
    if name == "cpu":
        if target in ("tpu-vm", "xpk"):
            raise UserError(f"target {target} starts accelerators; hardware is cpu")
        return Machines(chip=None, slices=1, hosts=config.nodes, chips_per_host=0)
    found = hardware.parse(name)
    kind = found.chip.name
    if found.chip.platform != "tpu":
        if target == "tpu-vm":
            raise UserError(f"target tpu-vm starts TPUs; hardware is {name}")
        if found.chips > hardware.GPUS_PER_NODE:
            raise UserError(f"hardware {name} is more than one node; give one node's, and their number in nodes")
        return Machines(chip=found, slices=1, hosts=config.nodes, chips_per_host=found.chips)
    if target == "slurm" or (target != "jobset" and not _TPUS[kind].prefix):
        raise UserError(f"target {target} cannot start {name}; use jobset")
    one_host = found.chips <= _ONE_HOST_CHIPS.get(kind, _TPU_HOST_CHIPS)
    hosts = 1 if one_host else found.chips // _TPU_HOST_CHIPS
    slices, rest = divmod(config.nodes, hosts)
    if rest or not slices:
        raise UserError(f"a slice {name} has {hosts} hosts, nodes is {config.nodes}; expected a multiple of {hosts}")
    if target == "tpu-vm" and slices > 1:
        raise UserError(f"target tpu-vm starts one slice of {hosts} hosts, nodes is {config.nodes}; use jobset or xpk")
    return Machines(chip=found, slices=slices, hosts=hosts, chips_per_host=found.chips // hosts)


def render(config: LaunchConfig, array: Array | None = None) -> str:
    """The text of the target's file.

    Args:
      array: runs of a sweep, in place of one run of `jaxdistill train`; slurm and jobset can start them.

    Raises:
      UserError: as `machines` and `LaunchConfig.command`, or the target or a task's machine is none for an array.
    """
    found = machines(config)
    if array and (config.target not in ("slurm", "jobset") or found.slices * found.hosts > 1):
        raise UserError(
            f"target is {config.target}, on {found.slices * found.hosts} hosts; runs of a sweep are one process each, "
            "with the devices of one host: expected slurm or jobset, and hardware of one host"
        )
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["quote"] = lambda value: shlex.quote(str(value))
    command = array.command if array else config.command
    values: dict[str, Any] = {"config": config, "command": command, "array": array, "machines": found, "port": PORT}
    codes = {"mistake": MISTAKE, "preempted": PREEMPTED}
    return environment.get_template(f"{_FILES[config.target].name}.jinja").render(**values, **codes)


def main(config: LaunchConfig) -> Path:
    """Writes the target's file."""
    return write(config, render(config))


def write(config: LaunchConfig, text: str) -> Path:
    """Writes what `render` gave, says how to use it, and returns its path."""
    file = _FILES[config.target]
    path = config.workdir / file.name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    manifest.write_config(config.workdir, config)
    manifest.write_manifest(config.workdir, "launch", [config.recipe], {"nodes": config.nodes}, target=config.target)
    Console(highlight=False, soft_wrap=True).print(f"wrote {path}; start it with: {file.start.format(path=path)}")
    return path


assert _FILES.keys() == set(get_args(Target))
