"""A training run that dies: what a restart finds is what an undisturbed run would have had, bit for bit."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import tiny

from jaxdistill import metrics
from jaxdistill.checkpoint import load_model

SIZES: dict[str, Any] = {"vocab_size": 264, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
HF, C = tiny.hf_config("qwen2", **SIZES), tiny.config("qwen2", **SIZES)
STEPS = 14
CHILD = """
import os, signal, sys, threading, time
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import jax
jax.config.update("jax_platforms", "cpu")
from jaxdistill import metrics, optim, train
from jaxdistill.checkpoint import Checkpoints
from jaxdistill.train_step import StepConfig
workdir, model, examples = map(Path, sys.argv[2:5])
at, during = int(sys.argv[5]), sys.argv[6]

def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)

write, save = metrics.MetricsLog.write, Checkpoints.save
def logged(self, step, **values):
    write(self, step, **values)
    if during == "step" and step == at:
        die()
def watch():
    while not list((workdir / "sft" / "checkpoints").glob(f"{at}.*tmp*")):  # an unfinished checkpoint
        time.sleep(0)
    die()
def saved(self, step, *arguments):
    if during == "save" and step == at:
        threading.Thread(target=watch, daemon=True).start()
    save(self, step, *arguments)
    if during == "save" and step == at:
        time.sleep(60)
metrics.MetricsLog.write, Checkpoints.save = logged, saved
phase = train.Phase(name="sft", examples=examples, steps=int(sys.argv[7]), optim=optim.OptimConfig(peak_lr=1e-2))
train.main(train.TrainConfig(workdir=workdir, model=model, phases=(phase,), row_tokens=128, batch_rows=2,
                             step=StepConfig(accumulate=2, compute_dtype="float32", neftune_alpha=5.0), save_every=3,
                             seed=5))
"""


def run_child(workdir: Path, model: Path, examples: Path, at: int, during: str, cache: Path) -> int:
    """One training process; returns its exit status."""
    words = [str(Path(__file__).parents[2]), str(workdir), str(model), str(examples), str(at), during, str(STEPS)]
    environment = {**os.environ, "JAX_COMPILATION_CACHE_DIR": str(cache)}
    environment |= {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.1"}
    done = subprocess.run(
        [sys.executable, "-c", CHILD, *words], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode in (0, -signal.SIGKILL), done.stderr
    return done.returncode


def newest(workdir: Path) -> int:
    """The newest checkpoint that was written whole; 0 if there is none."""
    folder = workdir / "sft" / "checkpoints"
    return max((int(path.name) for path in folder.glob("*") if path.name.isdigit()), default=0)


def starts_anew(before: dict[str, float] | None, row: dict[str, float]) -> bool:
    """Whether a row of metrics is the first of a call: the steps before it are not those it continues."""
    return before is None or row["step"] != before["step"] + 1


@pytest.mark.soak
def test_killed_and_restarted_run_gives_the_same_losses(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, full_size: bool
):
    """SIGKILL before the first checkpoint, between two, and while one is being written; NEFTune noise and all.

    At full size it is killed at every step and during every save.
    """
    model = tiny.write_folder(tmp_path / "hf", HF, tiny.values(C), C, with_tokenizer=True)
    examples = tiny.write_examples(tmp_path / "examples.jsonl", 24)
    cache = tmp_path_factory.mktemp("xla")
    assert run_child(tmp_path / "whole", model, examples, 0, "never", cache) == 0
    expected = {row["step"]: row["loss"] for row in metrics.read(tmp_path / "whole" / "sft") if "loss" in row}
    assert list(expected) == list(range(1, STEPS + 1))
    assert len(set(expected.values())) == STEPS

    kills = [(2, "step"), (5, "step"), (9, "save"), (13, "step")]
    if full_size:
        kills = [
            (at, during) for at in range(1, STEPS) for during in ("step", "save") if during == "step" or at % 3 == 0
        ]
    whole_saves: list[int] = []  # newest whole checkpoint before each start
    for at, during in kills:
        whole_saves.append(newest(tmp_path / "killed"))
        assert run_child(tmp_path / "killed", model, examples, at, during, cache) == -signal.SIGKILL, (at, during)
        if during == "save":
            left = {path.name for path in (tmp_path / "killed" / "sft" / "checkpoints").iterdir()}
            assert str(at) not in left
            assert any(name.startswith(f"{at}.") for name in left), left
    whole_saves.append(newest(tmp_path / "killed"))
    assert run_child(tmp_path / "killed", model, examples, 0, "never", cache) == 0

    lines = (tmp_path / "killed" / "sft" / "metrics.jsonl").read_text().splitlines()
    rows = [row for row in map(json.loads, lines) if "loss" in row]
    starts = [row["step"] for before, row in zip([None, *rows], rows, strict=False) if starts_anew(before, row)]
    assert starts == [step + 1 for step in whole_saves], "each call goes on after the newest whole checkpoint"
    assert whole_saves[-1] >= 9, "a save waits for the one before"
    assert {row["step"] for row in rows} == expected.keys()
    assert [row["loss"] for row in rows] == [expected[row["step"]] for row in rows], "bit for bit"
    with tiny.mesh():
        whole, _ = load_model(tmp_path / "whole" / "sft")
        killed, _ = load_model(tmp_path / "killed" / "sft")
    for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(killed), strict=True):
        np.testing.assert_array_equal(a, b)
