"""The training step of real models, compiled for slices of TPUs by their own compiler: memory and collectives."""

import dataclasses
from pathlib import Path
from typing import Any, NamedTuple

import jax
import kernels
import pytest
import tiny

from jaxdistill import weights
from jaxdistill.models import decoder
from jaxdistill.models.config import Config
from jaxdistill.models.lora import LoraConfig
from jaxdistill.plan import ahead, hardware
from jaxdistill.plan.ahead import Compiled
from jaxdistill.plan.collectives import KINDS
from jaxdistill.sharding import MeshConfig
from jaxdistill.train.bad_steps import BadStepsConfig
from jaxdistill.train.config import TrainConfig
from jaxdistill.train.trained import Trained

T = 32_768
GIB, MIB = 2**30, 2**20


class Case(NamedTuple):
    """A model on a slice."""

    shape: tuple[int, int, int, int, int]  # hidden, mlp, layers, heads, key/value heads
    hardware: str
    sizes: dict[str, int]  # of the mesh; a row a time on each of its rows of devices
    temporaries: float  # GiB at most: found, and a tenth


CASES = {
    "7B on v5e": Case((3584, 18_944, 28, 28, 4), "v5e:4x4", {"fsdp": 4, "context": 4}, 5.5),
    "72B on v5p": Case((8192, 29_568, 80, 64, 8), "v5p:4x8x8", {"fsdp": 64, "context": 4}, 11.9),
}


class Found(NamedTuple):
    case: Case
    c: Config
    step: Compiled


@pytest.fixture(scope="module", params=CASES)
def found(request: pytest.FixtureRequest) -> Found:
    kernels.require("libtpu")
    kernels.require("tokamax")
    case = CASES[request.param]
    embed, mlp, layers, heads, kv_heads = case.shape
    sizes = {"hidden_size": embed, "intermediate_size": mlp, "num_hidden_layers": layers, "vocab_size": 152_064}
    of_heads = {"num_attention_heads": heads, "num_key_value_heads": kv_heads, "head_dim": 128}
    c = tiny.config("qwen2", **sizes, **of_heads, max_position_embeddings=T)
    mesh = MeshConfig(**case.sizes)
    config = TrainConfig(
        workdir=Path("run"), model=Path("model"), row_tokens=T, batch_rows=case.sizes["fsdp"], mesh=mesh
    )
    devices = ahead.devices(hardware.parse(case.hardware))
    return Found(case, c, ahead.compile_step(config, c, mesh.build(devices)))


def test_the_step_skips_bad_batches_where_the_recipe_asks_for_it(monkeypatch: pytest.MonkeyPatch):
    """It then holds the usual norm of gradients, and chooses for every weight and moment."""
    programs: list[Any] = []

    def caught(traced: Any, mesh: Any) -> Any:
        programs.append(traced.jaxpr)
        raise ahead.DoesNotFitError(None)

    monkeypatch.setattr(ahead, "compile_for", caught)
    c = tiny.config("qwen2")
    plain = TrainConfig(workdir=Path("run"), model=Path("model"), row_tokens=64, batch_rows=1)
    skipping = dataclasses.replace(plain, bad_steps=BadStepsConfig(policy="skip", spike=5.0))
    for config in (plain, skipping):
        with pytest.raises(ahead.DoesNotFitError):
            ahead.compile_step(config, c, MeshConfig().build(jax.devices()[:1]))
    of_plain, of_skipping = programs
    assert len(of_skipping.in_avals) == len(of_plain.in_avals) + 1
    chosen = [sum(e.primitive.name == "select_n" for e in ahead.equations(p.jaxpr)) for p in programs]
    assert chosen[1] >= chosen[0] + 3 * len(jax.tree.leaves(tiny.values(c)))


def test_fits_with_room_to_spare(found: Found):
    case, c, step = found
    shards = case.sizes["fsdp"] * case.sizes["context"]
    vectors = c.layers * (2 * c.embed + (c.heads + 2 * c.kv_heads) * c.head_dim) + c.embed  # norms, biases: whole
    stored = (weights.count(decoder.template(c)) - vectors) / shards + vectors
    assert step.memory.weights == pytest.approx(4 * stored, rel=1e-5)
    assert step.memory.optimizer == pytest.approx(8 * stored, rel=1e-5)
    assert step.memory.saved == 2 * c.layers * T // case.sizes["context"] * c.embed, "each layer's input"
    assert step.memory.temporaries < case.temporaries * GIB
    assert step.memory.total < 0.92 * hardware.parse(case.hardware).device_memory
    assert step.memory.host == 0


def test_weights_are_gathered_by_layer_and_gradients_scattered(found: Found):
    case, c, step = found
    sent = {kind: [one for one in step.collectives if one.kind == kind] for kind in KINDS}
    assert max(one.payload_bytes for one in sent["all-reduce"]) < 8 * MIB
    mlp = 2 * c.embed * c.mlp  # bytes of one matrix of a layer's MLP in bfloat16
    for kind, passes in (("all-gather", 2), ("reduce-scatter", 1)):  # the backward pass gathers again
        over_fsdp = [one for one in sent[kind] if one.group == case.sizes["fsdp"] and one.times == c.layers]
        assert sum(one.payload_bytes == pytest.approx(mlp, rel=0.05) for one in over_fsdp) == 3 * passes, kind
    gathered = [one for one in sent["all-gather"] if one.dtype == "f32"]
    assert sum(one.times * one.payload_bytes for one in gathered) < 8 * MIB, "weights travel in bfloat16"


def test_adapters_are_planned_as_they_are_trained():
    """Weights that stay are held in the compute dtype, without gradients or moments."""
    kernels.require("libtpu")
    sizes = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 2, "vocab_size": 8192}
    heads = {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 128}
    c = tiny.config("qwen2", **sizes, **heads, max_position_embeddings=4096)
    mesh = MeshConfig(fsdp=4, tensor=4)
    recipe: dict[str, Any] = {
        "workdir": Path("run"),
        "model": Path("model"),
        "row_tokens": 4096,
        "batch_rows": 4,
        "mesh": mesh,
    }
    config = TrainConfig(**recipe, lora=LoraConfig(rank=16))
    found = ahead.compile_step(config, c, mesh.build(ahead.devices(hardware.parse("v5e:4x4"))))
    model, adapters = (weights.count(template) for template in (decoder.template(c), Trained(config, c).template))
    assert found.memory.frozen == pytest.approx(2 * model / 16, rel=0.01), "norms and biases are whole"
    assert found.memory.weights == 4 * adapters / 4, "one of an adapter's matrices over fsdp, the other over tensor"
    assert found.memory.optimizer == pytest.approx(2 * found.memory.weights, rel=1e-3)
    scattered = [one.times * one.payload_bytes for one in found.collectives if one.kind == "reduce-scatter"]
    assert sum(scattered) < 0.01 * 2 * model, "no gradients of the weights that stay"
