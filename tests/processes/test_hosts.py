"""One run in several processes: the numbers of one, preemption, another number of hosts, a host that is lost."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny

SIZES: dict[str, Any] = {"vocab_size": 264, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
HF, C = tiny.hf_config("qwen2", **SIZES), tiny.config("qwen2", **SIZES)
DEVICES = 4  # over all processes
STEPS = {"first": 4, "second": 40}  # of each phase; the second is cut off
RECIPE = """
from pathlib import Path
from jaxdistill.train import run as train
from jaxdistill.train import config as train_config
from jaxdistill.optim import OptimConfig
from jaxdistill.sharding import MeshConfig
from jaxdistill.train.step import StepConfig

def config():
    phases = tuple(
        train_config.Phase(name=name, examples=Path("{here}/examples.jsonl"), steps=n, optim=OptimConfig(peak_lr=1e-2))
        for name, n in {steps}.items()
    )
    return train.TrainConfig(workdir=Path("set by the test"), model=Path("{here}/hf"), phases=phases, row_tokens=128,
                             batch_rows=4, mesh=MeshConfig(fsdp=2, tensor=2),
                             step=StepConfig(accumulate=2, compute_dtype="float32", neftune_alpha=5.0),
                             save_every=1000, seed=5)
"""


# The token ids of every global batch that a run has on some meshes, and how many of its rows this process reads
DEAL = """
import runpy, sys, time
from dataclasses import replace
from pathlib import Path
import jax, numpy as np
from jax.experimental.multihost_utils import process_allgather
from jaxdistill import runtime
from jaxdistill.sharding import MeshConfig
from jaxdistill.train.goodput import Goodput
from jaxdistill.train.run import Run
from jaxdistill.train.step import place

recipe, workdir = map(Path, sys.argv[1:])
runtime.start(join=True, launched=time.time())
config = replace(runpy.run_path(str(recipe))["config"](), workdir=workdir, batch_rows=8)
found = {}
for name, mesh in {"by rows": MeshConfig(fsdp=2), "by rows and heads": MeshConfig(tensor=2)}.items():
    with jax.set_mesh(mesh.build()), runtime.Preemption() as preemption:
        run = Run(replace(config, mesh=mesh), preemption, Goodput(workdir, time.time(), writes=False))
        batches = [dealt.batch for dealt in run.batches(run.stages[1])]
        placed = [place(batch, config.step.accumulate).tokens for batch in batches]
        found[name] = np.stack([process_allgather(tokens, tiled=True) for tokens in placed])
        found[name + " here"] = np.array([(batch.segments > 0).any(1).sum() for batch in batches])
np.savez(workdir / f"{jax.process_index()}.npz", **found)
runtime.meet("all is written")
"""


class Job:
    """The processes of one command, `jaxdistill train` by default, started as a launcher does it."""

    def __init__(self, here: Path, workdir: Path, processes: int, *command: str):
        with socket.socket() as free:
            free.bind(("localhost", 0))
            address = f"localhost:{free.getsockname()[1]}"
        self.files = [workdir.with_name(f"{workdir.name}.{i}.log") for i in range(processes)]
        self.processes = []
        for i, path in enumerate(self.files):
            flags = f"--xla_force_host_platform_device_count={DEVICES // processes}"
            environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}
            environment |= {"JAX_COMPILATION_CACHE_DIR": str(here / "xla")}
            environment |= {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.1"}
            if processes > 1:
                environment |= {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": str(processes)}
                environment["JAX_PROCESS_ID"] = str(i)
            words = command or ("-m", "jaxdistill", "train", str(here / "recipe.py"), "--workdir", str(workdir))
            with path.open("w") as log:
                self.processes.append(
                    subprocess.Popen([sys.executable, *words], env=environment, stdout=log, stderr=log)
                )

    def wait(self, timeout_s: float = 400) -> list[int]:
        """Exit codes."""
        deadline = time.monotonic() + timeout_s
        try:
            return [process.wait(deadline - time.monotonic()) for process in self.processes]
        finally:
            for process in self.processes:
                process.kill()

    def log(self) -> str:
        return "\n".join(path.read_text(errors="replace") for path in self.files)


def write_recipe(folder: Path) -> Path:
    """A model, examples, and the recipe that trains on them."""
    tiny.write_folder(folder / "hf", HF, tiny.values(C), C, with_tokenizer=True)
    tiny.write_examples(folder / "examples.jsonl", 24)
    path = folder / "recipe.py"
    path.write_text(RECIPE.format(here=folder, steps=STEPS))
    return path


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, examples and a recipe, and the run that one process made without interruption in `whole`."""
    folder = tmp_path_factory.mktemp("hosts")
    write_recipe(folder)
    job = Job(folder, folder / "whole", 1)
    assert job.wait() == [0], job.log()
    return folder


def losses(folder: Path) -> list[tuple[int, float]]:
    """Step and loss as they were written, repetitions included."""
    path = folder / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return [(row["step"], row["loss"]) for row in map(json.loads, lines) if "loss" in row]


def wait_for(job: Job, folder: Path, step: int) -> None:
    """Until a step of a phase is written down."""
    deadline = time.monotonic() + 400
    while not any(number >= step for number, _ in losses(folder)):
        assert time.monotonic() < deadline, job.log()
        assert all(process.poll() is None for process in job.processes), job.log()
        time.sleep(0.02)


def test_a_run_that_loses_a_host_is_preempted_and_resumed_on_fewer_has_the_losses_of_an_undisturbed_one(here: Path):
    workdir = here / "disturbed"
    job = Job(here, workdir, 2)
    wait_for(job, workdir / "second", 1)
    job.processes[1].kill()
    assert job.wait(timeout_s=60)[0] not in (0, 2, 75), "launchers count it as a failure, and start again"
    lost = f"process 1 on {socket.gethostname()} is lost: last heard of at "
    assert lost in job.files[0].read_text(errors="replace")

    # One device each: two processes then hold the same rows, which a deal by the number of the process would miss
    job = Job(here, workdir, 4)
    wait_for(job, workdir / "second", 3)
    job.processes[1].send_signal(signal.SIGTERM)  # one is told, all save
    assert job.wait() == [75] * 4, job.log()
    saved = max(int(path.name) for path in (workdir / "second" / "checkpoints").glob("[0-9]*"))
    assert f"step {saved} of second is saved" in job.log()
    assert saved == losses(workdir / "second")[-1][0] < STEPS["second"]
    assert not (workdir / "manifest.json").exists()

    job = Job(here, workdir, 1)
    assert job.wait() == [0], job.log()
    assert f"resumed from step {saved}" in job.log()
    for phase, steps in STEPS.items():
        expected = dict(losses(here / "whole" / phase))
        found = losses(workdir / phase)
        assert {step for step, _ in found} == expected.keys() == set(range(1, steps + 1))
        np.testing.assert_allclose([x for _, x in found], [expected[step] for step, _ in found], rtol=1e-5)
    assert json.loads((workdir / "manifest.json").read_text())["devices"] == f"{DEVICES} x cpu"


def test_two_hosts_go_on_from_their_own_disks_to_the_same_losses_bit_for_bit(here: Path, tmp_path: Path):
    """Killed long after the last checkpoint that all could reach, which is that of the first phase."""
    workdir, every = here / "fast", 5
    words = ["-m", "jaxdistill", "train", str(here / "recipe.py"), "--workdir", str(workdir)]
    words += ["--fast.folder", str(tmp_path / "disk"), "--fast.every", str(every)]
    job = Job(here, workdir, 2, *words)
    wait_for(job, workdir / "second", 2 * every + 3)
    for process in job.processes:
        process.kill()
    job.wait()
    before = losses(workdir / "second")
    assert not list((workdir / "second" / "checkpoints").glob("[0-9]*"))

    job = Job(here, workdir, 2, *words)
    assert job.wait() == [0, 0], job.log()
    *_, resumed = map(int, re.findall(r"resumed from step (\d+)", job.files[0].read_text()))  # after the first phase's
    assert resumed >= 2 * every
    assert resumed % every == 0
    found, again = losses(workdir / "second"), losses(workdir / "second")[len(before) :]
    assert [step for step, _ in again] == list(range(resumed + 1, STEPS["second"] + 1))
    done_twice = {step: loss for step, loss in again if step <= before[-1][0]}
    assert done_twice
    assert done_twice.items() <= dict(before).items()
    expected = dict(losses(here / "whole" / "second"))
    np.testing.assert_allclose([x for _, x in found], [expected[step] for step, _ in found], rtol=1e-5)


def test_a_mistake_is_every_hosts_mistake(here: Path):
    workdir = here / "mistake"
    (workdir / "first").mkdir(parents=True)
    recipe = (here / "recipe.py").read_text()
    try:
        (here / "recipe.py").write_text(recipe.replace("batch_rows=4", "batch_rows=6"))
        job = Job(here, workdir, 2)
        assert job.wait(120) == [2, 2], job.log()
    finally:
        (here / "recipe.py").write_text(recipe)
    assert job.log().count("rows at a time") == 2


def test_every_global_batch_has_the_same_tokens_for_any_number_of_processes(tmp_path: Path):
    recipe, found = write_recipe(tmp_path), {}
    for count in (1, 2, 4):
        workdir = tmp_path / f"dealt{count}"
        workdir.mkdir()
        job = Job(tmp_path, workdir, count, "-c", DEAL, str(recipe), str(workdir))
        assert job.wait() == [0] * count, job.log()
        found[count] = [dict(np.load(workdir / f"{i}.npz")) for i in range(count)]
    (alone,) = found[1]
    for count, jobs in found.items():
        for name in ("by rows", "by rows and heads"):
            assert alone[name].shape == (len(alone[f"{name} here"]), 2, 4, 128)
            assert len({batch.tobytes() for batch in alone[name]}) > 10, (
                "batches differ, or there is nothing to compare"
            )
            for one in jobs:
                np.testing.assert_array_equal(one[name], alone[name])
            read = sum(one[f"{name} here"] for one in jobs)
            # Both halves of the heads need a row: where they are in two processes, both read it
            twice = 2 if count == 4 and name == "by rows and heads" else 1
            np.testing.assert_array_equal(read, twice * alone[f"{name} here"])
