"""The training step compiled for H100s that are not here: what fits, what is on the host, and what the wire carries."""

import dataclasses
import json
import runpy
from pathlib import Path
from typing import Any

import kernels
import pytest
import tiny

from jaxdistill.errors import UserError
from jaxdistill.models.config import Config
from jaxdistill.optim import OptimConfig
from jaxdistill.plan import ahead, cuda, hardware
from jaxdistill.sharding import MeshConfig
from jaxdistill.train.config import Phase, TrainConfig, read_architecture
from jaxdistill.train.step import StepConfig

GIB = 2**30
CONFIGS = Path(__file__).parents[2] / "configs"
QWEN3_8B: dict[str, Any] = {
    "vocab_size": 151_936,
    "hidden_size": 4096,
    "intermediate_size": 12_288,
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 40_960,
}
QWEN_MATH_72B: dict[str, Any] = {
    "vocab_size": 152_064,
    "hidden_size": 8192,
    "intermediate_size": 29_568,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 4096,
}
QWEN_7B: dict[str, Any] = {
    "vocab_size": 152_064,
    "hidden_size": 3584,
    "intermediate_size": 18_944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "max_position_embeddings": 131_072,
}


def recipe(folder: Path, mesh: MeshConfig, state_dtype: Any, **changes: Any) -> tuple[TrainConfig, Config]:
    """A 7B with rows of 32,768 and its architecture."""
    (folder / "config.json").write_text(json.dumps(tiny.hf_config("qwen2", **QWEN_7B)))
    phase = Phase(name="sft", examples=folder / "none.jsonl", optim=OptimConfig(state_dtype=state_dtype))
    config = TrainConfig(workdir=folder, model=folder, phases=(phase,), row_tokens=32_768, batch_rows=1, mesh=mesh)
    config = dataclasses.replace(config, **changes)
    return config, read_architecture(config)[1]


def compiled(config: TrainConfig, c: Config, name: str, documents: int | None = None) -> ahead.Compiled:
    kernels.require("jax_cuda13_plugin")
    return ahead.compile_step(config, c, config.mesh.build(ahead.devices(hardware.parse(name))), documents)


def test_without_the_plugin_it_is_said_what_brings_the_compiler(monkeypatch: pytest.MonkeyPatch):
    def missing(**arguments: str) -> None:
        raise NotImplementedError(f"topology not implemented for {arguments['platform']}")

    monkeypatch.setattr(cuda.topologies, "get_topology_desc", missing)
    with pytest.raises(UserError, match=r"h100 1x8, 8 chips: .* not implemented for cuda.*jaxdistill\[cuda13\]"):
        ahead.devices(hardware.parse("h100x8"))


def test_nodes_are_told_apart():
    kernels.require("jax_cuda13_plugin")
    devices = ahead.devices(hardware.parse("h100x128"))
    assert [device.process_index for device in devices] == [node for node in range(16) for _ in range(8)]
    assert {(device.platform, device.device_kind) for device in devices} == {("gpu", "NVIDIA H100")}


def test_a_7b_on_a_node_gathers_its_weights_in_bfloat16_and_scatters_their_gradients(tmp_path: Path):
    config, c = recipe(tmp_path, MeshConfig(fsdp=8), "float32", batch_rows=8)
    found = compiled(config, c, "h100x8")
    weights = 4 * (sum(c.matmul_weights) + c.vocab * c.embed) / 8
    assert found.memory.weights == pytest.approx(weights, rel=0.001)
    assert found.memory.optimizer == pytest.approx(2 * weights, rel=0.001)
    assert found.memory.total < 32 * GIB
    assert found.memory.host == 0
    # Gathered: the layers twice, the head once, by every device from seven others
    gathered = 2 * (2 * c.matmul_weights[0] + c.matmul_weights[1]) * 7 / 8
    assert sum(x.wire_bytes for x in found.collectives if x.kind == "all-gather") == pytest.approx(gathered, rel=0.01)
    scattered = 2 * c.matmul_weights[0] * 7 / 8 + 4 * c.matmul_weights[1] * 7 / 8  # the head's is summed in float32
    assert sum(x.wire_bytes for x in found.collectives if x.kind == "reduce-scatter") == pytest.approx(scattered, 0.01)
    assert max(x.payload_bytes for x in found.collectives if x.kind == "all-reduce") < GIB / 1024


def test_the_recipe_of_a_7b_on_one_gpu_holds_its_moments_on_the_host(tmp_path: Path):
    config, c = recipe(tmp_path, MeshConfig(), "bfloat16")
    shipped = runpy.run_path(str(CONFIGS / "one_gpu_7b.py"))["config"]()
    found = compiled(dataclasses.replace(shipped, model=tmp_path), c, "h100")
    assert shipped.row_tokens == config.row_tokens
    weights = 2 * (sum(c.matmul_weights) + c.vocab * c.embed)
    assert found.memory.weights == pytest.approx(weights, rel=0.001)
    assert found.memory.optimizer == 0
    assert found.memory.host == pytest.approx(2 * weights, rel=0.001)
    assert found.memory.total < 56 * GIB


def test_an_8b_with_rows_of_half_a_million_tokens_on_one_gpu(tmp_path: Path):
    (tmp_path / "config.json").write_text(json.dumps(tiny.hf_config("qwen3", **QWEN3_8B)))
    recipe = runpy.run_path(str(CONFIGS / "one_gpu_8b_long.py"))["config"]()
    config = dataclasses.replace(recipe, model=tmp_path)
    found = compiled(config, read_architecture(config)[1], "h100", documents=8)
    assert found.memory.total < 0.94 * 79.1 * GIB
    assert 160 * GIB < found.memory.host < 180 * GIB
    assert not found.collectives


def test_the_papers_recipe_on_128(tmp_path: Path):
    """With the mesh that its docstring names."""
    recipe = runpy.run_path(str(CONFIGS / "paper_math72b.py"))["config"]()
    (tmp_path / "config.json").write_text(json.dumps(tiny.hf_config("qwen2", **QWEN_MATH_72B)))
    config = dataclasses.replace(recipe, model=tmp_path, mesh=MeshConfig(fsdp=32, tensor=2))
    found = compiled(config, read_architecture(config)[1], "h100x128", documents=16)
    assert found.memory.total < 70 * GIB
    assert found.memory.host == 0
    # Groups of two are those of tensor parallelism, and of data, which a device's own part of a gradient crosses
    assert max(x.payload_bytes for x in found.collectives if x.kind == "all-reduce" and x.group > 2) < GIB / 1024


def test_rows_of_131_072_on_a_node_by_ulysses(tmp_path: Path):
    step = StepConfig(context="ulysses", remat="attention")
    mesh = MeshConfig(fsdp=2, context=4)
    config, c = recipe(tmp_path, mesh, "bfloat16", row_tokens=131_072, batch_rows=2, step=step)
    found = compiled(config, c, "h100x8")
    assert found.memory.total < 60 * GIB
    exchanged = sum(x.wire_bytes for x in found.collectives if x.kind == "all-to-all" and x.group == 4)
    # Queries, keys and values there and the output back, forward and backward; again where the layer is recomputed
    one_way = 2 * 131_072 // 4 * c.head_dim * (2 * c.heads + 2 * c.kv_heads) * 3 / 4
    assert 2 * c.layers * one_way < exchanged < 3.1 * c.layers * one_way
