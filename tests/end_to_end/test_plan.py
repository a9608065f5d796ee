"""`jaxdistill plan` as a user runs it: a recipe, a config.json and no device."""

import json
from pathlib import Path

import kernels
import pytest
import tiny
from test_demo import jaxdistill

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
    found = json.loads((tmp_path / "run" / "plan" / "v5e-2x2.json").read_text())
    [plan] = found["plans"]
    assert plan["problem"] == ""
    assert plan["mesh"] == {"data": 1, "fsdp": 2, "context": 2, "tensor": 1}
    assert plan["memory"]["optimizer"] == pytest.approx(2 * plan["memory"]["weights"], rel=1e-3)
    assert {"all-gather", "reduce-scatter"} <= {one["kind"] for one in plan["collectives"]}
    assert found["measured"] is None
