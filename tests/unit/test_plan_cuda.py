"""The training step compiled for H100s that are not here: what fits, what is on the host, and what the wire carries."""

import dataclasses
import json
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
from jaxdistill.train import Phase, TrainConfig, read_architecture
from jaxdistill.train_step import StepConfig

GIB = 2**30
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


def compiled(config: TrainConfig, c: Config, name: str) -> ahead.Compiled:
    kernels.require("jax_cuda13_plugin")
    return ahead.compile_step(config, c, config.mesh.build(ahead.devices(hardware.parse(name))))


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


def test_moments_that_wait_on_the_host_are_counted_there(tmp_path: Path):
    step = StepConfig(offload_moments=True, remat="offload")
    config, c = recipe(tmp_path, MeshConfig(), "bfloat16", step=step)
    found = compiled(config, c, "h100")
    weights = 2 * (sum(c.matmul_weights) + c.vocab * c.embed)
    assert found.memory.weights == pytest.approx(weights, rel=0.001)
    assert found.memory.optimizer == 0
    assert found.memory.saved == 0
    saved = 2 * c.layers * config.row_tokens * (c.embed + c.heads * c.head_dim)
    assert 2 * weights + saved < found.memory.host < 1.3 * (2 * weights + saved), "the softmax's log-sums too"
    assert found.memory.total < 50 * GIB
