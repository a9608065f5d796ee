"""The recipe of the ablations at its smallest, as a user runs it: killed between two runs, and gone on with."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from jaxdistill import lineage

ROOT = Path(__file__).parents[2]


def test_a_killed_sweep_goes_on_with_what_is_missing(tmp_path: Path):
    small = {"train-problems": 60, "reformat-problems": 12, "heldout-problems": 6}
    words = [word for name, count in small.items() for word in (f"--material.{name}", str(count))]
    words += ["--data-sizes", "24", "--seeds", "0"]
    words += ["--evaluate.slots", "8", "--evaluate.sampling.max-new-tokens", "16"]
    # Two of the recipe's variants, and its folders where the test may write
    recipe = tmp_path / "two.py"
    recipe.write_text(
        "import dataclasses, runpy\n"
        f"recipe = runpy.run_path({str(ROOT / 'configs' / 'sweep_ablations.py')!r})['config']()\n"
        "def config():\n"
        "    return dataclasses.replace(recipe, variants=(recipe.variants[1], recipe.variants[4]))\n"
    )
    command = [sys.executable, "-m", "jaxdistill", "sweep", str(recipe), *words]
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    environment |= {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    runs = tmp_path / "runs" / "sweep_ablations" / "runs"
    first, second = (runs / f"{name}-n24-s0" for name in ("no_phase_1", "shorter_chains"))

    process = subprocess.Popen(command, cwd=tmp_path, env=environment, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 300
    while not (first / "result.json").is_file():
        assert process.poll() is None, process.stderr and process.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGKILL)  # what it started goes on without it
    process.communicate()
    written = (first / "result.json").stat().st_mtime_ns
    assert not (second / "result.json").is_file()

    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "2 runs, 1 of them done" in done.stderr
    assert (first / "result.json").stat().st_mtime_ns == written
    lines = [json.loads(line) for line in (runs.parent / "table.jsonl").read_text().splitlines()]
    assert [line["run"] for line in lines] == [first.name, second.name]
    for line in lines:
        assert line["examples"] == 24
        assert line["parameters"] > 100_000
        assert line["heldout_loss"] > 0
        assert line["low"] <= line["accuracy"] == 1 - line["error"] <= line["high"]
    assert lines[0]["tokens"] > lines[1]["tokens"]  # half of the steps are left out
    found = lineage.trace([second])
    assert {stage.command for stage in found.stages.values()} >= {"collect", "examples", "part", "train", "evaluate"}
    assert found.gaps == []
