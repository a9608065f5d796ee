"""Checkpoints: what is saved comes back on another mesh, and a folder that is none says so."""

import dataclasses
import errno
import re
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
import tiny

from jaxdistill import optim, train_step
from jaxdistill.checkpoint import Checkpoints, base_of, keep_base, load_model, newest_input
from jaxdistill.errors import UserError
from jaxdistill.models import decoder
from jaxdistill.optim import OptimConfig

HF = tiny.hf_config("qwen3")
C = tiny.config("qwen3")
OPTIMIZER = optim.make(OptimConfig(), 10, decoder.template(C))


def new_state() -> train_step.State:
    """A state whose moments are neither zero nor like each other."""
    state = train_step.new_state(tiny.put(tiny.values(C), C), OPTIMIZER, seed=7)
    generator = np.random.default_rng(7)

    def draw(x: jax.Array) -> jax.Array:
        return jax.device_put(generator.uniform(1, 9, x.shape).astype(x.dtype), x.sharding)

    return dataclasses.replace(state, opt_state=jax.tree.map(draw, state.opt_state))


def comparable(state: train_step.State) -> train_step.State:
    """On the host, with the key's data in place of the key."""
    return jax.device_get(dataclasses.replace(state, key=jax.random.key_data(state.key)))


@pytest.fixture(scope="module")
def phase(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A phase folder with checkpoints of steps 2, 4 and 6, of which two are kept."""
    source = tiny.write_folder(tmp_path_factory.mktemp("hf") / "hf", HF, tiny.values(C), C, with_tokenizer=True)
    folder = tmp_path_factory.mktemp("phase")
    keep_base(source, folder)
    with tiny.mesh(fsdp=4, tensor=2):
        state = new_state()
        checkpoints = Checkpoints(folder, keep=2)
        for step in (2, 4, 6):
            checkpoints.save(step, dataclasses.replace(state, step=state.step + step), {"at": step})
        checkpoints.close()
    return folder


@pytest.mark.parametrize("sizes", [{"fsdp": 4, "tensor": 2}, {}, {"data": 2, "fsdp": 2}], ids=str)
def test_state_comes_back_on_any_mesh(phase: Path, sizes: dict[str, int]):
    with tiny.mesh(**sizes):
        like = train_step.abstract_state(decoder.template(C), OPTIMIZER, np.float32)
        checkpoints = Checkpoints(phase)
        assert checkpoints.latest_step == 6
        state, position = checkpoints.restore(6, like)
        checkpoints.close()
        expected = new_state()
        assert position == {"at": 6}
        assert int(state.step) == 6
        assert state.params.embed.sharding.spec == jax.P("tensor", ("fsdp", "context"))
        assert dict(state.params.embed.sharding.mesh.shape) == tiny.ONE_DEVICE | sizes
        found, wanted = comparable(state), comparable(dataclasses.replace(expected, step=expected.step + 6))
        jax.tree.map(np.testing.assert_array_equal, found, wanted)


def test_model_is_opened_from_a_phase_or_from_a_hugging_face_folder(phase: Path):
    assert base_of(phase) == phase / "base"
    with tiny.mesh(tensor=2):
        params, c = load_model(phase)
        assert c == C
        jax.tree.map(np.testing.assert_array_equal, jax.device_get(params), tiny.values(C))
        assert load_model(phase, step=4)[1] == C
        with pytest.raises(UserError, match=r"no checkpoint of step 2; found \[4, 6\]"):
            load_model(phase, step=2)
    with tiny.mesh(tensor=8), pytest.raises(UserError, match="N = 4 is not a multiple of 8"):
        load_model(phase)


def test_a_full_disk_is_foreseen_and_leaves_the_last_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    with tiny.mesh(data=2, fsdp=2):
        state, checkpoints = new_state(), Checkpoints(tmp_path)
        checkpoints.save(1, state, {})
        usage = shutil.disk_usage(tmp_path)
        monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
        with pytest.raises(OSError, match=re.escape(str(tmp_path))) as caught:
            checkpoints.save(2, state, {})
        whole = sum(leaf.nbytes for leaf in jax.tree.leaves(state))  # of one replica, though two devices hold one each
        monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=whole - 1))
        with pytest.raises(OSError, match="No space left"):
            checkpoints.save(2, state, {})
        assert caught.value.errno == errno.ENOSPC
        assert checkpoints.latest_step == 1
        checkpoints.close()
        again = Checkpoints(tmp_path)
        assert again.latest_step == 1
        monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=whole))
        again.save(2, state, {})
        again.close()
        assert newest_input(tmp_path) == (2, {})


def test_a_disk_that_fills_up_while_writing_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    with tiny.mesh():
        checkpoints = Checkpoints(tmp_path)

        def full(*_: object) -> None:
            raise ValueError('RESOURCE_EXHAUSTED: Error writing "params" in OCDBT database')

        monkeypatch.setattr(checkpoints, "_write", full)
        with pytest.raises(OSError, match="No space left") as caught:
            checkpoints.save(1, new_state(), {})
        assert caught.value.errno == errno.ENOSPC
        checkpoints.close()


def test_phase_without_checkpoints(phase: Path, tmp_path: Path):
    keep_base(phase / "base", tmp_path)
    (tmp_path / "checkpoints").mkdir()
    with tiny.mesh(), pytest.raises(UserError, match="has no whole checkpoint; found none"):
        load_model(tmp_path)


def test_folder_that_is_no_model(tmp_path: Path):
    with tiny.mesh(), pytest.raises(UserError, match=r"config.json not found"):
        load_model(tmp_path)
