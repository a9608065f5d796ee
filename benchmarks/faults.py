"""What is lost when something fails: real runs of a tiny model, and of a collection, that are hit and started again.

    .venv/bin/python benchmarks/faults.py [--times 5] [--only clock full ...]        (`make faults`)

Each run ends in the state of one that nothing happened to, or the table says so and the command fails: every loss of
every step bit for bit, the data and the weights of the last step; of a collection, every answer that was on the disk.
"lost" are steps that were done again, or answers that were paid for again.
"""

import argparse
import collections
import contextlib
import dataclasses
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import tensorstore
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
import tiny

from jaxdistill.local_teacher.app import TeacherOptions
from jaxdistill.local_teacher.problems import generate
from jaxdistill.local_teacher.server import running_teacher
from jaxdistill.records import write_jsonl

SIZES: dict[str, Any] = {"vocab_size": 264, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
STEPS, SAVE_EVERY, SAVE_LIMIT_S, TIMEOUT_S = 60, 10, 20, 300
RECIPE = """
from pathlib import Path
from jaxdistill.optim import OptimConfig
from jaxdistill.sharding import MeshConfig
from jaxdistill.train.config import Phase, TrainConfig
from jaxdistill.train.step import StepConfig

def config():
    phase = Phase(name="sft", examples=Path("{here}/examples.jsonl"), steps={steps}, optim=OptimConfig(peak_lr=1e-2))
    return TrainConfig(workdir=Path("given"), model=Path("{here}/hf"), phases=(phase,), row_tokens=128, batch_rows=4,
                       mesh=MeshConfig(fsdp=2), step=StepConfig(compute_dtype="float32"), save_every={every},
                       save_limit_s={limit}, seed=5)
"""


@dataclasses.dataclass
class Outcome:
    """Of one fault."""

    lost: list[int] = dataclasses.field(default_factory=list)  # at each time it was tried
    said: str = ""  # the line that the user reads, where there is one


class EndedError(RuntimeError):
    """A run came to its end too early."""


class Training:
    """Runs of one recipe on two simulated devices, or in two processes of one device each."""

    def __init__(self, here: Path):
        self.here = here
        c = tiny.config("qwen2", **SIZES)
        tiny.write_folder(here / "hf", tiny.hf_config("qwen2", **SIZES), tiny.values(c), c, with_tokenizer=True)
        tiny.write_examples(here / "examples.jsonl", 24)
        (here / "recipe.py").write_text(RECIPE.format(here=here, steps=STEPS, every=SAVE_EVERY, limit=SAVE_LIMIT_S))
        self.finish(here / "undisturbed")
        self.expected = dict(self.losses(here / "undisturbed"))

    def start(self, workdir: Path, **environment: str) -> subprocess.Popen[str]:
        """One process of `jaxdistill train`; what it says is in a file beside the folder."""
        flags = "--xla_force_host_platform_device_count=" + ("1" if "JAX_PROCESS_ID" in environment else "2")
        cached = {
            "JAX_COMPILATION_CACHE_DIR": str(self.here / "xla"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        }
        variables = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags, **cached, **environment}
        command = [sys.executable, "-m", "jaxdistill", "train", str(self.here / "recipe.py"), "--workdir", str(workdir)]
        with workdir.with_suffix(f".{environment.get('JAX_PROCESS_ID', '0')}.log").open("a") as log:
            return subprocess.Popen(command, env=variables, stdout=log, stderr=log, text=True)

    def said(self, workdir: Path, word: str, process: int = 0) -> str:
        """The last line with a word in it; empty without one."""
        lines = workdir.with_suffix(f".{process}.log").read_text(errors="replace").splitlines()
        return next((line for line in reversed(lines) if word in line), "")

    def finish(self, workdir: Path) -> None:
        """Goes on to the last step."""
        code = self.start(workdir).wait(TIMEOUT_S)
        if code:
            raise RuntimeError(f"exit code {code}: {workdir.with_suffix('.0.log').read_text()[-2000:]}")

    def losses(self, workdir: Path) -> list[tuple[int, float]]:
        """Step and loss as they were written, repetitions included."""
        path = workdir / "sft" / "metrics.jsonl"
        rows = (
            [json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")] if path.is_file() else []
        )
        return [(row["step"], row["loss"]) for row in rows if "loss" in row]

    def wait_for(self, process: subprocess.Popen[str], happened: Callable[[], bool]) -> None:
        """Until something has happened to a run that goes on meanwhile."""
        deadline = time.monotonic() + TIMEOUT_S
        while not happened():
            if process.poll() is not None or time.monotonic() > deadline:
                raise EndedError("the run ended before it could be hit")
            time.sleep(0.001)

    def wait_for_step(self, process: subprocess.Popen[str], workdir: Path, step: int) -> None:
        """Until a step is written down."""
        self.wait_for(process, lambda: any(number >= step for number, _ in self.losses(workdir)))

    def done_again(self, workdir: Path) -> int:
        """Steps that were done more than once, in a run that has come to its end as the undisturbed one did.

        Raises:
          RuntimeError: it has not.
        """
        found = self.losses(workdir)
        wrong = [step for step, loss in found if loss != self.expected[step]]
        if wrong or {step for step, _ in found} != self.expected.keys():
            raise RuntimeError(f"{workdir}: other losses than without the fault, at steps {sorted(set(wrong))}")
        return len(found) - len(self.expected)


Fault = Callable[[Training, Path, random.Random], tuple[int, str]]  # what is lost, and what is said
FAULTS: dict[str, tuple[str, Fault]] = {}


def fault(name: str, words: str) -> Callable[[Fault], Fault]:
    """Registers a fault under a name for --only, and in words for the table."""

    def register(function: Fault) -> Fault:
        FAULTS[name] = (words, function)
        return function

    return register


@fault("kill", "training is killed at a random step")
def kill(training: Training, workdir: Path, rng: random.Random) -> tuple[int, str]:
    process = training.start(workdir)
    training.wait_for_step(process, workdir, rng.randrange(1, STEPS - 5))
    process.kill()
    process.wait()
    training.finish(workdir)
    return training.done_again(workdir), training.said(workdir, "resumed from")


@fault("kill-save", "training is killed while a checkpoint is written")
def kill_while_saving(training: Training, workdir: Path, rng: random.Random) -> tuple[int, str]:
    process, at = training.start(workdir), SAVE_EVERY * rng.randrange(1, STEPS // SAVE_EVERY)
    folder = workdir / "sft" / "checkpoints"
    training.wait_for(process, lambda: any(folder.glob(f"{at}.*")) if folder.is_dir() else False)
    process.kill()
    process.wait()
    training.finish(workdir)
    return training.done_again(workdir), training.said(workdir, "resumed from")


@fault("preempt", "training is told to end (SIGTERM)")
def preempt(training: Training, workdir: Path, rng: random.Random) -> tuple[int, str]:
    process = training.start(workdir)
    training.wait_for_step(process, workdir, rng.randrange(1, STEPS - 5))
    process.send_signal(signal.SIGTERM)
    if (code := process.wait(TIMEOUT_S)) != 75:
        raise RuntimeError(f"exit code {code}, expected 75")
    said = training.said(workdir, "preempted")
    training.finish(workdir)
    return training.done_again(workdir), said


@fault("host", "one of two hosts is killed")
def lose_a_host(training: Training, workdir: Path, rng: random.Random) -> tuple[int, str]:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    job = {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": "2"}
    processes = [training.start(workdir, **job, JAX_PROCESS_ID=str(i)) for i in range(2)]
    training.wait_for_step(processes[0], workdir, rng.randrange(1, STEPS - 10))
    victim = rng.randrange(2)
    processes[victim].kill()
    started = time.monotonic()
    code = processes[1 - victim].wait(60)
    said = training.said(workdir, "is lost" if victim else "; the leader is at", 1 - victim)
    if code in (0, 2) or not said:
        raise RuntimeError(f"the other process ended with {code} after {time.monotonic() - started:.0f} s, unnamed")
    training.finish(workdir)
    found = training.losses(workdir)  # another number of processes: equal within rounding
    wrong = [step for step, loss in found if abs(loss / training.expected[step] - 1) > 1e-5]
    if wrong or {step for step, _ in found} != training.expected.keys():
        raise RuntimeError(f"other losses than without the fault, at steps {sorted(set(wrong))}")
    return len(found) - len(training.expected), said


def _half_done(training: Training, workdir: Path, rng: random.Random) -> Path:
    """A run that was stopped after its second checkpoint; the newest one."""
    process = training.start(workdir)
    training.wait_for_step(process, workdir, rng.randrange(2 * SAVE_EVERY + 2, STEPS - 5))
    process.send_signal(signal.SIGTERM)
    process.wait(TIMEOUT_S)
    folder = workdir / "sft" / "checkpoints"
    return max((path for path in folder.iterdir() if path.name.isdigit()), key=lambda path: int(path.name))


@fault("bit", "one bit of the newest checkpoint changes in storage")
def flip_a_bit(training: Training, workdir: Path, rng: random.Random) -> tuple[int, str]:
    place = _half_done(training, workdir, rng) / "state"
    base = {"driver": "ocdbt", "base": f"file://{place}/"}
    spec: Any = {"driver": "zarr", "kvstore": {**base, "path": "params.embed/"}}
    array = tensorstore.open(spec, open=True).result()
    row, column = rng.randrange(array.shape[0]), rng.randrange(array.shape[1])
    value = array[row, column].read().result().view("uint32") ^ (1 << rng.randrange(32))
    array[row, column].write(value.astype("uint32").view("float32")).result()
    training.finish(workdir)
    return training.done_again(workdir), training.said(workdir, "checkpoint damaged")


@fault("cut", "a file of the newest checkpoint is cut short")
def cut_a_file(training: Training, workdir: Path, rng: random.Random) -> tuple[int, str]:
    place = _half_done(training, workdir, rng)
    file = max((path for path in place.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
    os.truncate(file, rng.randrange(file.stat().st_size))
    training.finish(workdir)
    return training.done_again(workdir), training.said(workdir, "checkpoint damaged")


@fault("full", "the disk is full at a checkpoint")
def fill_the_disk(training: Training, workdir: Path, rng: random.Random) -> tuple[int, str]:
    if os.geteuid():
        raise PermissionError("mounting a small disk needs root")
    workdir.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", workdir], check=True)
    try:
        process = training.start(workdir)
        training.wait_for_step(process, workdir, rng.randrange(SAVE_EVERY + 1, 2 * SAVE_EVERY))
        with contextlib.suppress(OSError), (workdir / "filler").open("wb") as filler:
            while True:
                filler.write(b"0" * 2**12)
                filler.flush()
        if (code := process.wait(TIMEOUT_S)) != 1:
            raise RuntimeError(f"exit code {code} on a full disk, expected 1")
        said = training.said(workdir, "disk is full")
        (workdir / "filler").unlink()
        training.finish(workdir)
        return training.done_again(workdir), said
    finally:
        subprocess.run(["umount", workdir], check=True)


@fault("clock", "the clock jumps by days, forth and back")
def jump(training: Training, workdir: Path, rng: random.Random) -> tuple[int, str]:
    import libfaketime

    offset = workdir.with_suffix(".clock")
    offset.write_text("+0\n")
    faked = {
        **libfaketime.get_reload_information()[1],
        "FAKETIME_TIMESTAMP_FILE": str(offset),
        "FAKETIME_NO_CACHE": "1",
        "DONT_FAKE_MONOTONIC": "1",
    }
    process = training.start(workdir, **faked)
    for days in ("+3d", "-3d", "+0d"):
        at = max((step for step, _ in training.losses(workdir)), default=0)
        with contextlib.suppress(EndedError):
            training.wait_for_step(process, workdir, min(at + rng.randrange(2, 12), STEPS - 2))
        offset.write_text(f"{days}\n")
    code = process.wait(TIMEOUT_S)
    if said := training.said(workdir, "the clock was set back"):  # and tensorstore waits for that time to come again
        training.finish(workdir)
    elif code:
        raise RuntimeError(f"exit code {code}: {workdir.with_suffix('.0.log').read_text()[-2000:]}")
    return training.done_again(workdir), said


def _answers(log: Path) -> collections.Counter[str]:
    """How often the teacher has answered each request, by its own log."""
    entries = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
    return collections.Counter(entry["body_sha256"] for entry in entries if entry["status"] == 200)


@contextlib.contextmanager
def _collection(workdir: Path, count: int, **options: Any) -> Iterator[tuple[list[str], Path]]:
    """The command that collects so many answers from a local teacher that misbehaves as told, and the teacher's log."""
    workdir.mkdir()
    log = workdir / "teacher.jsonl"
    write_jsonl(workdir / "problems.jsonl", generate("all", count, seed=2, split="train"))
    with running_teacher(TeacherOptions(latency_s=0.05, log=log, **options)) as base_url:
        words = ["collect", "--problems", workdir / "problems.jsonl", "--workdir", workdir / "run"]
        words += ["--teacher.base-url", base_url, "--teacher.profile", "local", "--teacher.max-tokens", "400"]
        words += ["--teacher.in-flight", "16", "--teacher.backoff-s", "0.05"]
        yield [sys.executable, "-m", "jaxdistill", *map(str, words)], log


def _collected(command: list[str], workdir: Path, log: Path, count: int) -> tuple[int, str]:
    """Collects to the end; answers that were made twice, and what is said at the end."""
    done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S)
    if done.returncode:
        raise RuntimeError(done.stderr[-2000:])
    counts = json.loads((workdir / "run" / "manifest.json").read_text())["counts"]
    answered = _answers(log)
    if len(answered) != count or counts.get("failed"):
        raise RuntimeError(f"{len(answered)} of {count} requests were answered, counts are {counts}")
    return sum(answered.values()) - count, ""


@fault("collector", "collecting is killed (16 requests in flight)")
def kill_the_collector(_: Training, workdir: Path, rng: random.Random) -> tuple[int, str]:
    count = 120
    with _collection(workdir, count) as (command, log):
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        wanted = rng.randrange(5, count - 20)
        while sum(_answers(log).values()) < wanted and process.poll() is None:
            time.sleep(0.005)
        process.kill()
        process.wait()
        time.sleep(1)  # what is in flight reaches the log
        return _collected(command, workdir, log, count)


@fault("connection", "a third of the teacher's first 60 answers break off")
def break_connections(_: Training, workdir: Path, rng: random.Random) -> tuple[int, str]:
    script = workdir.with_suffix(".script")
    lines: list[dict[str, Any]] = [{"drop": True} if rng.random() < 1 / 3 else {} for _ in range(60)]
    write_jsonl(script, lines)
    with _collection(workdir, 80, script=script) as (command, log):
        return _collected(command, workdir, log, 80)


def main() -> None:
    """Tries the faults and prints the table; exit code 1 where one of them has cost more than it may."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--times", type=int, default=5, help="that each fault is tried")
    parser.add_argument("--only", nargs="*", default=list(FAULTS), choices=list(FAULTS), help="of the faults")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    options = parser.parse_args()
    table, failed = Table("fault", "tried", "lost (mean, most)", "what is said"), 0
    with tempfile.TemporaryDirectory(prefix="jaxdistill-faults-") as folder:
        training = Training(Path(folder))
        for name in options.only:
            words, function = FAULTS[name]
            outcome, wrong = Outcome(), ""
            for i in range(options.times):
                workdir = Path(folder) / f"{name}{i}"
                try:
                    lost, outcome.said = function(training, workdir, random.Random(f"{options.seed} {name} {i}"))
                    outcome.lost.append(lost)
                except PermissionError as error:
                    wrong = f"not tried: {error}"
                    break
                except RuntimeError as error:
                    wrong, failed = f"FAILED: {error}", failed + 1
                    break
                shutil.rmtree(workdir, ignore_errors=True)
            lost = outcome.lost
            shown = f"{sum(lost) / len(lost):.1f}, {max(lost)}" if lost else "-"
            said = (wrong or outcome.said).replace(folder, "...")
            table.add_row(words, str(len(lost)), shown, said)
            print(f"{words} | {len(lost)} | {shown} | {said}", flush=True)
    Console(width=160).print(table)
    raise SystemExit(1 if failed else 0)


if __name__ == "__main__":
    main()
