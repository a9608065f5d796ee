"""Training runs that save memory: checkpoints, resuming, the next phase and the export of weights in bfloat16."""

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import tiny

from jaxdistill import export, hf, metrics
from jaxdistill.checkpoint import load_model
from jaxdistill.errors import UserError
from jaxdistill.optim import OptimConfig
from jaxdistill.sharding import MeshConfig
from jaxdistill.train import run as train
from jaxdistill.train.config import Phase, TrainConfig
from jaxdistill.train.step import StepConfig

SIZES: dict[str, Any] = {"vocab_size": 264, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
HF, C = tiny.hf_config("qwen2", **SIZES, dtype="bfloat16"), tiny.config("qwen2", **SIZES)
STEPS = 4


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> TrainConfig:
    """Two phases with weights and moments in bfloat16, the moments on the host; the first hands on an average."""
    folder = tmp_path_factory.mktemp("run")
    model = tiny.write_folder(folder / "hf", HF, tiny.values(C), C, with_tokenizer=True)
    examples = tiny.write_examples(folder / "examples.jsonl", 24)
    settings = OptimConfig(peak_lr=1e-2, state_dtype="bfloat16")
    first = Phase(name="first", examples=examples, steps=2, optim=dataclasses.replace(settings, average_decay=0.5))
    return TrainConfig(
        workdir=folder / "run",
        model=model,
        phases=(first, Phase(name="second", examples=examples, steps=STEPS, optim=settings)),
        heldout=examples,
        row_tokens=128,
        batch_rows=8,
        mesh=MeshConfig(data=2, fsdp=4),
        step=StepConfig(compute_dtype="float32", offload_moments=True, remat="offload"),
        save_every=2,
    )


@pytest.fixture(scope="module")
def trained(config: TrainConfig) -> dict[str, Any]:
    return train.main(config)


def newest_weights(folder: Path) -> Any:
    with tiny.mesh():
        return jax.device_get(load_model(folder, dtype=jnp.bfloat16)[0])


def test_a_resumed_run_is_the_same_to_the_last_bit(config: TrainConfig, trained: dict[str, Any]):
    folder = config.workdir / "second"
    whole, rows = newest_weights(folder), metrics.read(folder)
    shutil.rmtree(folder / "checkpoints" / str(STEPS))
    assert train.main(config) == trained
    jax.tree.map(np.testing.assert_array_equal, newest_weights(folder), whole)
    losses = [[row["loss"] for row in found if "loss" in row] for found in (metrics.read(folder), rows)]
    assert len(losses[0]) == STEPS
    assert losses[0] == losses[1]


def test_the_next_phase_starts_from_the_average_in_bfloat16(config: TrainConfig, trained: dict[str, Any]):
    handed_on = trained["first"]["heldout_loss"]
    rows = metrics.read(config.workdir / "second")
    assert rows[0]["heldout_loss"] == pytest.approx(handed_on, rel=1e-3), "rounded once, to nearest"
    assert rows[-1]["heldout_loss"] < handed_on


def test_the_export_holds_the_weights_bit_for_bit(config: TrainConfig, trained: dict[str, Any], tmp_path: Path):
    export.main(export.ExportConfig(workdir=tmp_path / "hf", model=config.workdir / "second"))
    with tiny.mesh():
        exported = jax.device_get(hf.load(tmp_path / "hf", ml_dtypes.bfloat16)[0])
    jax.tree.map(np.testing.assert_array_equal, exported, newest_weights(config.workdir / "second"))


def test_another_state_is_not_resumed(config: TrainConfig, trained: dict[str, Any]):
    first, second = config.phases
    wide = dataclasses.replace(second, optim=dataclasses.replace(second.optim, state_dtype="float32"))
    with pytest.raises(UserError, match=r"second was trained to step 4 with another value of: optim;"):
        train.main(dataclasses.replace(config, phases=(first, wide)))


def test_where_moments_wait_may_change_between_restarts(config: TrainConfig, trained: dict[str, Any]):
    folder = config.workdir / "second"
    whole = newest_weights(folder)
    shutil.rmtree(folder / "checkpoints" / str(STEPS))
    train.main(dataclasses.replace(config, step=dataclasses.replace(config.step, offload_moments=False)))
    jax.tree.map(np.testing.assert_array_equal, newest_weights(folder), whole)
