"""Ways to run a recipe, ranked by formula: what is tried, what stays the same, and what is refused."""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import pytest
import tiny

from jaxdistill import weights
from jaxdistill.errors import UserError
from jaxdistill.models import decoder, lora
from jaxdistill.models.config import Config
from jaxdistill.models.lora import LoraConfig
from jaxdistill.plan import hardware, search
from jaxdistill.plan.run import PlanConfig
from jaxdistill.plan.search import Candidate, OptimizerState
from jaxdistill.train.config import TrainConfig

V5E = hardware.parse("v5e:4x4")
STATES: tuple[OptimizerState, ...] = ("float32", "offloaded", "bfloat16")


def model() -> Config:
    """Qwen2.5-7B."""
    shape = {"vocab_size": 152_064, "hidden_size": 3584, "intermediate_size": 18_944, "num_hidden_layers": 28}
    heads = {"num_attention_heads": 28, "num_key_value_heads": 4, "head_dim": 128}
    return tiny.config("qwen2", **shape, **heads, max_position_embeddings=131_072)


def recipe(**changes: Any) -> TrainConfig:
    values = {"workdir": Path("run"), "model": Path("model"), "row_tokens": 32_768, "batch_rows": 16} | changes
    return TrainConfig(**values)


def candidates(config: TrainConfig, target: str = "v5e:4x4", **searched: Any) -> list[Candidate]:
    return search.candidates(config, model(), hardware.parse(target), jax.devices()[0], 8192.0, **searched)


def state_of(found: Candidate) -> OptimizerState:
    if found.config.step.offload_moments:
        return "offloaded"
    return found.config.phases[0].optim.state_dtype


def test_every_way_is_a_step_of_as_many_tokens():
    found = candidates(recipe(), row_tokens=(16_384, 32_768, 65_536), states=STATES)
    assert {way.config.row_tokens for way in found} == {16_384, 32_768, 65_536}
    assert {state_of(way) for way in found} == set(STATES)
    for way in found:
        config, sizes = way.config, way.sizes
        assert config.batch_rows * config.row_tokens == 16 * 32_768
        assert config.batch_rows == config.step.accumulate * sizes["data"] * sizes["fsdp"], "a row each at a time"
        assert sizes["data"] * sizes["fsdp"] * sizes["context"] * sizes["tensor"] == 16


def test_weights_are_split_over_context_too():
    """Qwen2.5-7B in float32 fits 16 chips of 15.75 GiB at 32,768 tokens: 104 GiB of state and gradients over all 16."""
    found = candidates(recipe(), states=("float32",))
    assert {way.sizes["data"] for way in found} == {1}, "with two copies of the state nothing fits"
    assert any(way.sizes["context"] > 1 for way in found)


def test_of_equals_the_preferred_state_is_ranked_first():
    """Where there is room for any, a leaner state saves little, which is not worth other numbers."""
    found = candidates(recipe(batch_rows=64), target="v5p:4x4x4", states=STATES)
    assert state_of(found[0]) == "float32"
    same = {state_of(way): way.estimate for way in found if (way.sizes, way.config.step.remat) == _way(found[0])}
    plain, offloaded, lean = (same[state] for state in STATES)
    assert lean.memory_s < plain.memory_s
    assert offloaded.host_s > plain.host_s == 0
    assert lean.step_s < plain.step_s < offloaded.step_s


def _way(found: Candidate) -> tuple[dict[str, int], str]:
    return found.sizes, found.config.step.remat


def test_the_recipes_own_state_is_the_only_one_by_default():
    optim = dataclasses.replace(recipe().phases[0].optim, state_dtype="bfloat16")
    config = recipe(phases=(dataclasses.replace(recipe().phases[0], optim=optim),))
    assert {state_of(way) for way in candidates(config)} == {"bfloat16"}


def test_adapters_need_no_gradients_or_moments_of_the_weights_that_stay():
    config = recipe(lora=LoraConfig(rank=16))
    assert max(way.sizes["data"] for way in candidates(config)) > 1, "14 GiB of weights: more than one copy fits"
    offloading = dataclasses.replace(config, step=dataclasses.replace(config.step, offload_moments=True))
    sizes = {"data": 1, "fsdp": 4, "context": 4, "tensor": 1}
    adapters = weights.count(lora.template(config.lora, decoder.template(model())))
    assert search.host_bytes(model(), offloading, sizes) == 2 * 2 * 4 * adapters / 16


def test_moments_cross_to_the_host_and_back():
    config = recipe(step=dataclasses.replace(recipe().step, offload_moments=True))
    sizes = {"data": 1, "fsdp": 4, "context": 4, "tensor": 1}
    parameters = 7.6e9
    assert search.host_bytes(model(), config, sizes) == pytest.approx(2 * 2 * 4 * parameters / 16, rel=0.01)
    assert search.host_bytes(model(), recipe(), sizes) == 0


@pytest.mark.parametrize(("remat", "width"), [("full", 0), ("offload_inputs", 3584), ("offload", 2 * 3584)])
def test_what_a_remat_policy_keeps_on_the_host_crosses_twice(remat: Any, width: int):
    config = recipe(step=dataclasses.replace(recipe().step, remat=remat))
    sizes = {"data": 1, "fsdp": 4, "context": 4, "tensor": 1}
    assert search.host_bytes(model(), config, sizes) == 2 * 2 * 28 * 32_768 * width, "positions of a device: one row's"


def test_what_does_not_come_out_even_or_does_not_fit_is_refused():
    with pytest.raises(UserError, match="rows of 30000 tokens do not make up a step of 16 x 32768"):
        candidates(recipe(), row_tokens=(30_000,))
    with pytest.raises(UserError, match="none fits by formula"):
        candidates(recipe(), target="v5e:2x2", states=("float32",))


@pytest.mark.parametrize(
    "settings",
    [
        {"tokens": 0},
        {"document_tokens": 0.0},
        {"documents": 0},
        {"compiled": 0},
        {"positions": 0},
        {"live_tokens": 0.0},
    ],
    ids=str,
)
def test_a_plan_of_nothing_is_refused(settings: dict[str, Any]):
    [(name, value)] = settings.items()
    with pytest.raises(UserError, match=f"^{name} is {value}; expected 1 or more"):
        PlanConfig(train=recipe(), **settings)
