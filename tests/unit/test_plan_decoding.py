"""The decoding step compiled for TPUs that are not here: what it holds, and what it sends."""

import json
from pathlib import Path
from typing import Any

import kernels
import pytest
import tiny

from jaxdistill import weights
from jaxdistill.errors import RunError, UserError
from jaxdistill.models import decoder
from jaxdistill.plan import ahead, decoding, hardware, run
from jaxdistill.plan.decoding import Decoding
from jaxdistill.plan.run import PlanConfig
from jaxdistill.sample.engine import EngineConfig
from jaxdistill.sharding import MeshConfig
from jaxdistill.train.config import TrainConfig

SLOTS, POSITIONS, LIVE = 128, 32_768, 10_000.0
SIZES: dict[str, Any] = {"hidden_size": 3584, "intermediate_size": 18_944, "num_hidden_layers": 2, "vocab_size": 8192}
HEADS: dict[str, Any] = {
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "max_position_embeddings": POSITIONS,
}
C = tiny.config("qwen2", **SIZES, **HEADS)
POSITION_BYTES = 2 * 2 * C.layers * C.kv_heads * C.head_dim  # keys and values in bfloat16


def compiled(mesh: MeshConfig, **changes: Any) -> Decoding:
    kernels.require("libtpu")
    target = hardware.parse("v5e:4x4")
    devices: Any = ahead.devices(target)
    engine = EngineConfig(slots=SLOTS, **changes)
    return decoding.compile_decoding(C, target, mesh.build(devices), engine, POSITIONS, LIVE)


def test_a_step_reads_weights_and_live_cache_and_copies_neither():
    found = compiled(MeshConfig(data=4, tensor=4))
    assert found.cache == SLOTS * POSITIONS * POSITION_BYTES // 16
    assert found.temporaries < 0.25 * found.cache, "the cache is written in place: a copy of keys is half of it"
    vectors = 2 * (C.layers * (2 * C.embed + (C.heads + 2 * C.kv_heads) * C.head_dim) + C.embed)  # partly split
    matrices = 2 * weights.count(decoder.template(C)) - vectors
    assert matrices / 4 < found.weights < matrices / 4 + vectors
    assert found.read == found.weights + SLOTS // 4 * LIVE * POSITION_BYTES / 4
    logits = 4 * SLOTS // 4 * C.vocab
    assert {(one.kind, one.payload_bytes) for one in found.collectives if one.payload_bytes >= 2**20} == {
        ("all-gather", logits)
    }
    assert found.roofline_s < found.step_s


@pytest.mark.parametrize("kernel", ["xla", "mosaic"])
def test_a_cache_of_many_heads_is_written_in_place(kernel: Any):
    found = compiled(MeshConfig(data=16), attention=kernel)
    assert found.cache == SLOTS * POSITIONS * POSITION_BYTES // 16
    assert found.temporaries < 0.2 * found.cache, "no layer's keys or values are copied: they are a quarter"


def test_pages_are_split_along_context_and_kept_in_8_bits():
    found = compiled(MeshConfig(data=1, context=4, tensor=4), cache_dtype="int8", weight_dtype="int8")
    scales = 2 * 4 * C.layers * C.kv_heads
    assert found.cache == SLOTS * POSITIONS * (POSITION_BYTES // 2 + scales) // 16
    assert found.temporaries < 0.25 * found.cache
    assert "all-gather" not in {one.kind for one in found.collectives if one.group == 4 and one.dtype != "f32"}, (
        "weights are not gathered"
    )


def test_gpus_read_the_cache_where_it_lies():
    kernels.require("jax_cuda13_plugin")
    target = hardware.parse("h100")
    mesh = MeshConfig().build(ahead.devices(target))
    positions = 4096  # one stretch of a row
    engine = EngineConfig(slots=SLOTS, attention="triton")
    found = decoding.compile_decoding(C, target, mesh, engine, positions, positions / 2)
    one_page_of_each_row = 2 * SLOTS * EngineConfig().page_tokens * POSITION_BYTES // (2 * C.layers)
    assert found.temporaries < one_page_of_each_row, "no page is copied, as XLA does of one of each row"


def recipe(folder: Path, **changes: Any) -> PlanConfig:
    values = tiny.hf_config("qwen2", **SIZES, **HEADS)
    (folder / "config.json").write_text(json.dumps(values))
    mesh = MeshConfig(data=4, tensor=4)
    train = TrainConfig(workdir=folder / "run", model=folder, mesh=mesh)
    return PlanConfig(train=train, hardware="v5e:4x4", decode=True, **changes)


def test_the_command_writes_what_it_prints(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    kernels.require("libtpu")
    assert run.main(recipe(tmp_path, engine=EngineConfig(slots=SLOTS), live_tokens=LIVE)) == []
    [path] = (tmp_path / "run" / "plan").iterdir()
    found = json.loads(path.read_text())
    assert found["slots"] == SLOTS
    assert f"{found['slots'] / found['step_s']:,.0f} tokens/s" in " ".join(capsys.readouterr().out.split())


def test_what_does_not_fit_and_what_does_not_go_together(tmp_path: Path):
    kernels.require("libtpu")
    with pytest.raises(RunError, match=r"needs .* a device.*fewer engine.slots"):
        run.main(recipe(tmp_path, engine=EngineConfig(slots=16_384)))
    with pytest.raises(UserError, match="decode does not go with search"):
        recipe(tmp_path, search=True)
