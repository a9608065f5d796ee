"""What a run measured of the step that is planned, and what is no measurement of it."""

import dataclasses
from pathlib import Path

import pytest

from jaxdistill import manifest
from jaxdistill.errors import UserError
from jaxdistill.metrics import MetricsLog
from jaxdistill.plan import measured
from jaxdistill.sharding import MeshConfig
from jaxdistill.train.config import TrainConfig


@pytest.fixture
def config(tmp_path: Path) -> TrainConfig:
    return TrainConfig(workdir=tmp_path / "run", model=Path("model"), mesh=MeshConfig(fsdp=4))


def write_run(config: TrainConfig, seconds: list[float]) -> Path:
    """The files of a run that was stopped after some steps."""
    manifest.write_config(config.workdir, config)
    log = MetricsLog(config.workdir / config.phases[0].name)
    log.write(0, heldout_loss=1.0)
    for step, value in enumerate(seconds, start=1):
        log.write(step, step_s=value)
    log.close()
    return config.workdir


def test_median_step_without_the_first_ones(config: TrainConfig):
    run = write_run(config, [90.0, 5.0, 1.5, 1.6, 2.9])
    found = measured.read(run, config)
    assert (found.steps, found.step_s) == (3, 1.6)


def test_the_size_of_data_may_be_left_open(config: TrainConfig):
    run = write_run(config, [9.0, 1.0, 1.0])
    planned = dataclasses.replace(config, mesh=MeshConfig(data=1, fsdp=4))
    assert measured.read(run, planned).steps == 1


def test_another_step_is_no_measurement(config: TrainConfig):
    run = write_run(config, [9.0, 1.0, 1.0])
    other = dataclasses.replace(config, row_tokens=4096, step=dataclasses.replace(config.step, remat="none"))
    with pytest.raises(UserError, match=r"ran another step .*: row_tokens, step differ; plan with row_tokens 8192"):
        measured.read(run, other)


def test_no_run_and_no_steps(config: TrainConfig, tmp_path: Path):
    with pytest.raises(UserError, match="expected the run folder"):
        measured.read(tmp_path / "nowhere", config)
    with pytest.raises(UserError, match="no more than 2 timed steps"):
        measured.read(write_run(config, [9.0, 1.0]), config)
