"""A training run that dies: what a restart finds is what an undisturbed run would have had, bit for bit."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import pytest
import tiny

from jaxdistill.checkpoint import load_model
from jaxdistill.checkpoint_store import Checkpoints, restore_newest

SIZES: dict[str, Any] = {"vocab_size": 264, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
HF, C = tiny.hf_config("qwen2", **SIZES), tiny.config("qwen2", **SIZES)
STEPS = {"first": 5, "second": 9}  # of each phase
CHILD = """
import os, signal, sys, threading, time
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import jax
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 2)
from jaxdistill import metrics, optim, sharding
from jaxdistill.train import run as train
from jaxdistill.train import config as train_config
from jaxdistill.checkpoint_store import Checkpoints
from jaxdistill.train.step import StepConfig
workdir, model, examples = map(Path, sys.argv[2:5])
phase_to_die_in, at, during, steps = sys.argv[5], int(sys.argv[6]), sys.argv[7], eval(sys.argv[8])
now = None  # the phase that is being trained

def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)

def due(step):
    return (now, step) == (phase_to_die_in, at)

one_phase, write, save = train.Run.one_phase, metrics.MetricsLog.write, Checkpoints.save
def entered(self, stage, *arguments):
    global now
    now = stage.name
    return one_phase(self, stage, *arguments)
def logged(self, step, **values):
    write(self, step, **values)
    if during == "step" and due(step):
        die()
def watch():
    while not list((workdir / now / "checkpoints").glob(f"{at}.*tmp*")):  # an unfinished checkpoint
        time.sleep(0)
    die()
def saved(self, step, *arguments):
    if during == "save" and due(step):
        threading.Thread(target=watch, daemon=True).start()
    save(self, step, *arguments)
    if during == "save" and due(step):
        time.sleep(60)
train.Run.one_phase, metrics.MetricsLog.write, Checkpoints.save = entered, logged, saved
phases = tuple(train_config.Phase(name=name, examples=examples, steps=n, optim=optim.OptimConfig(peak_lr=1e-2))
               for name, n in steps.items())
train.main(train.TrainConfig(workdir=workdir, model=model, phases=phases, row_tokens=128, batch_rows=4,
                             mesh=sharding.MeshConfig(fsdp=2),
                             step=StepConfig(accumulate=2, compute_dtype="float32", neftune_alpha=5.0), save_every=3,
                             seed=5))
"""


SAVER = """
import sys
from pathlib import Path
import jax, numpy as np
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 2)
from jaxdistill.checkpoint_store import Checkpoints
folder = Path(sys.argv[1])
over_two = jax.sharding.NamedSharding(jax.make_mesh((2,), ("fsdp",)), jax.P("fsdp"))
checkpoints = Checkpoints(folder)
for step in range(1, 10**6):
    weights = np.random.default_rng(step).random((3, 64, 32), np.float32)
    checkpoints.save(step, {"a": jax.device_put(weights[0], over_two), "b": jax.device_put(weights[1:])}, {"at": step})
    (folder / "new").write_text(str(step - 1))  # is whole by now
    (folder / "new").rename(folder / "whole")
"""


class Kill(NamedTuple):
    """When a process dies: at a step of a phase, once its metrics are written or while it is being saved."""

    phase: str
    step: int
    during: str


NEVER = Kill("", 0, "never")


def run_child(workdir: Path, model: Path, examples: Path, kill: Kill, cache: Path) -> int:
    """One training process; returns its exit status."""
    words = [Path(__file__).parents[2], workdir, model, examples, *kill, STEPS]
    environment = {**os.environ, "JAX_COMPILATION_CACHE_DIR": str(cache)}
    environment |= {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.1", "XLA_FLAGS": ""}
    command = [sys.executable, "-c", CHILD, *map(str, words)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode in (0, -signal.SIGKILL), done.stderr
    return done.returncode


def newest(folder: Path) -> int:
    """The newest checkpoint of a phase that was written whole; 0 if there is none."""
    return max((int(path.name) for path in (folder / "checkpoints").glob("*") if path.name.isdigit()), default=0)


def losses(folder: Path) -> list[tuple[int, float]]:
    """Step and loss as they were written, repetitions included."""
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [(row["step"], row["loss"]) for row in map(json.loads, lines) if "loss" in row]


@pytest.mark.soak
def test_killed_and_restarted_run_gives_the_same_losses(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, full_size: bool
):
    """SIGKILL before the first checkpoint, while one is being written, between two phases and later; two devices.

    At full size it is killed at every step and during every save.
    """
    model = tiny.write_folder(tmp_path / "hf", HF, tiny.values(C), C, with_tokenizer=True)
    examples = tiny.write_examples(tmp_path / "examples.jsonl", 24)
    cache = tmp_path_factory.mktemp("xla")
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert run_child(whole, model, examples, NEVER, cache) == 0
    expected = {phase: dict(losses(whole / phase)) for phase in STEPS}
    assert {phase: list(found) for phase, found in expected.items()} == {
        phase: list(range(1, steps + 1)) for phase, steps in STEPS.items()
    }
    assert len({loss for found in expected.values() for loss in found.values()}) == sum(STEPS.values())

    kills = [Kill("first", 2, "step"), Kill("second", 1, "step"), Kill("second", 6, "save"), Kill("second", 8, "step")]
    if full_size:
        every = [Kill(phase, at, "step") for phase, steps in STEPS.items() for at in range(1, steps)]
        kills = sorted([*every, *(kill._replace(during="save") for kill in every if kill.step % 3 == 0)])
    starts: dict[str, list[int]] = {phase: [] for phase in STEPS}  # the first step of each call that trains a phase
    for kill in [*kills, NEVER]:
        for phase in [name for name in STEPS if name <= (kill.phase or "second")]:
            if (found := newest(killed / phase)) < STEPS[phase]:
                starts[phase].append(found + 1)
        assert run_child(killed, model, examples, kill, cache) == (0 if kill is NEVER else -signal.SIGKILL), kill
        if kill.during == "save":
            left = {path.name for path in (killed / kill.phase / "checkpoints").iterdir()}
            assert str(kill.step) not in left
            assert any(name.startswith(f"{kill.step}.") for name in left), left

    for phase in STEPS:
        rows = losses(killed / phase)
        follows = zip([0, *(step for step, _ in rows)], rows, strict=False)
        first = [step for before, (step, _) in follows if step != before + 1 or before == 0]
        assert first == starts[phase], "each call goes on after the newest whole checkpoint"
        assert [loss for _, loss in rows] == [expected[phase][step] for step, _ in rows], "bit for bit"
        with tiny.mesh():
            undisturbed, _ = load_model(whole / phase)
            resumed, _ = load_model(killed / phase)
        for a, b in zip(jax.tree.leaves(undisturbed), jax.tree.leaves(resumed), strict=True):
            np.testing.assert_array_equal(a, b)


def test_a_kill_at_any_moment_of_a_save_leaves_the_one_before_it(tmp_path: Path):
    """What SIGKILL would leave at 20 random moments of a process that does nothing but save: its files while it stands.

    The last one is killed for real; 20 that start would take minutes.
    """
    folder, rng = tmp_path / "phase", random.Random(11)
    folder.mkdir()
    unfinished, newest_steps = 0, []
    with tiny.mesh() as mesh:
        place = jax.NamedSharding(mesh, jax.P())
        like = {
            name: jax.ShapeDtypeStruct(shape, np.float32, sharding=place)
            for name, shape in {"a": (64, 32), "b": (2, 64, 32)}.items()
        }
        with subprocess.Popen([sys.executable, "-c", SAVER, folder], env={**os.environ, "XLA_FLAGS": ""}) as process:
            try:
                for i in range(20):
                    while not (folder / "whole").exists() or newest(folder) < 2:
                        assert process.poll() is None
                        time.sleep(0.1)
                    time.sleep(rng.uniform(0, 0.3))
                    process.send_signal(signal.SIGSTOP)
                    while not stands(process.pid):
                        time.sleep(0.001)
                    left = shutil.copytree(folder, tmp_path / "left")
                    process.send_signal(signal.SIGKILL if i == 19 else signal.SIGCONT)

                    unfinished += any("tmp" in path.name for path in (left / "checkpoints").iterdir())
                    told: list[str] = []
                    again = Checkpoints(left)
                    found = restore_newest([again], like, told.append)
                    assert found is not None
                    step, state, position = found
                    assert not told
                    assert int((left / "whole").read_text()) <= step == position["at"]
                    expected = np.random.default_rng(step).random((3, 64, 32), np.float32)
                    np.testing.assert_array_equal(state["a"], expected[0])
                    np.testing.assert_array_equal(state["b"], expected[1:])
                    again.save(step + 1, state, {"at": step + 1})
                    again.close()
                    assert newest(left) == step + 1, "in the place of what was left"
                    assert not any("tmp" in path.name for path in (left / "checkpoints").iterdir())
                    newest_steps.append(step)
                    shutil.rmtree(left)
            finally:
                process.kill()
    assert unfinished > 5
    assert len(set(newest_steps)) > 5


def stands(pid: int) -> bool:
    """Whether all threads of a process are stopped."""
    states = [(path / "stat").read_text().rpartition(")")[2].split()[0] for path in Path(f"/proc/{pid}/task").iterdir()]
    return set(states) == {"T"}
