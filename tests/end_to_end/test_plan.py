"""`jaxdistill plan` as a user runs it: a recipe, a config.json and no device."""

import dataclasses
import json
import runpy
from pathlib import Path

import kernels
import pytest
import tiny
from test_demo import jaxdistill

from jaxdistill import manifest, metrics
from jaxdistill.sharding import MeshConfig

RECIPE = """
from pathlib import Path
from jaxdistill.sharding import MeshConfig
from jaxdistill.train.config import Phase, TrainConfig

def config():
    phases = (Phase(name="a", examples=Path("none")),)
    workdir, model = Path({workdir!r}), Path({model!r})
    mesh = MeshConfig(fsdp=2, context=2)
    return TrainConfig(workdir=workdir, model=model, phases=phases, row_tokens=4096, batch_rows=4, mesh=mesh)
"""


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    kernels.require("libtpu")
    kernels.require("tokamax")
    model = tmp_path / "model"
    model.mkdir()
    shape = {"vocab_size": 1024, "hidden_size": 512, "intermediate_size": 1024, "head_dim": 128}
    changed = tiny.hf_config("qwen2") | shape | {"max_position_embeddings": 4096}
    (model / "config.json").write_text(json.dumps(changed))
    path = tmp_path / "recipe.py"
    path.write_text(RECIPE.format(workdir=str(tmp_path / "run"), model=str(model)))
    return path


def test_plan_of_a_recipe_without_its_data(recipe: Path, tmp_path: Path) -> None:
    done = jaxdistill("plan", str(recipe), "--hardware", "v5e:2x2", "--document-tokens", "500")
    assert done.returncode == 0, done.stderr[-3000:]
    words = " ".join(done.stdout.split())
    for part in ("v5e 2x2, 4 chips: 4 devices of 15.8 GiB", "fsdp 2 x context 2", "GiB", "a billion tokens", "MFU"):
        assert part in words
    assert "warning" not in words
    found = json.loads((tmp_path / "run" / "plan" / "v5e-2x2.json").read_text())
    [plan] = found["plans"]
    assert plan["problem"] == ""
    assert plan["mesh"] == {"data": 1, "fsdp": 2, "context": 2, "tensor": 1}
    assert plan["memory"]["optimizer"] == pytest.approx(2 * plan["memory"]["weights"], rel=1e-3)
    assert {"all-gather", "reduce-scatter"} <= {one["kind"] for one in plan["collectives"]}
    assert found["measured"] is None


def test_a_plan_is_kept_beside_what_was_measured_and_warns_of_its_mesh(recipe: Path, tmp_path: Path) -> None:
    """Of a run of the same step elsewhere, on a mesh whose gradients the compiler adds up whole."""
    config = dataclasses.replace(runpy.run_path(str(recipe))["config"](), mesh=MeshConfig(fsdp=4))
    manifest.write_config(config.workdir, config)
    log = metrics.MetricsLog(config.workdir / "a", track=())
    for step, seconds in enumerate([9.0, 9.0, 0.25, 0.5, 0.75], start=1):
        log.write(step, step_s=seconds)
    log.close()
    run, mesh = str(config.workdir), ("--train.mesh.fsdp", "4", "--train.mesh.context", "1")
    asked = ("--hardware", "v5litepod-4", *mesh, "--tokens", "1000000000000", "--measured", run)
    done = jaxdistill("plan", str(recipe), *asked)
    assert done.returncode == 0, done.stderr[-3000:]
    words = " ".join(done.stdout.split())
    assert "warning: mesh.fsdp 4 is all devices, and TPUs add gradients up whole" in words
    found = json.loads((config.workdir / "plan" / "v5litepod-4.json").read_text())
    predicted, measured = found["plans"][0]["estimate"]["step_s"], found["measured"]
    assert (measured["run"], measured["steps"], measured["step_s"]) == (run, 3, 0.5)
    assert measured["predicted_over_measured"] == pytest.approx(predicted / 0.5)
    hours = 1e12 / (4 * 4096) * predicted / 3600
    dollars = hours * 4 * 1.2
    assert f"the recipe: {hours:,.1f} hours, ${dollars:,.0f} at $1.20 a chip and hour" in words
