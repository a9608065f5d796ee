"""Checkpoints: what is saved comes back on another mesh, and a folder that is none says so."""

import dataclasses
import errno
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tensorstore as ts
import tiny

from jaxdistill import checkpoint_tensors, integrity, optim
from jaxdistill.checkpoint import base_of, keep_base, load_model
from jaxdistill.checkpoint_damage import DamagedError
from jaxdistill.checkpoint_retention import Retention
from jaxdistill.checkpoint_store import Checkpoints, newest_input, restore_newest
from jaxdistill.errors import StuckError, UserError
from jaxdistill.models import decoder
from jaxdistill.optim import OptimConfig
from jaxdistill.train import step as train_step

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
        checkpoints = Checkpoints(folder, Retention(keep=2))
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


def test_a_save_that_is_not_written_in_its_time_is_waited_for_no_longer(tmp_path: Path):
    with tiny.mesh():
        state, checkpoints = new_state(), Checkpoints(tmp_path, limit_s=0.0)
        checkpoints.save(1, state, {})
        with pytest.raises(StuckError, match="not written in 0 s; the storage hangs, or the clock was set back"):
            checkpoints.save(2, state, {})
        with pytest.raises(StuckError):
            checkpoints.close()


def test_phase_without_checkpoints(phase: Path, tmp_path: Path):
    keep_base(phase / "base", tmp_path)
    (tmp_path / "checkpoints").mkdir()
    with tiny.mesh(), pytest.raises(UserError, match="has no whole checkpoint; found none"):
        load_model(tmp_path)


def test_folder_that_is_no_model(tmp_path: Path):
    with tiny.mesh(), pytest.raises(UserError, match=r"config.json not found"):
        load_model(tmp_path)


# --- damage ----------------------------------------------------------------------------------------------------------


def flip_a_number(step: Path) -> None:
    """One bit of a weight, in the way storage itself would write it: its own checks are all passed."""
    spec = {"driver": "zarr", "kvstore": {"driver": "ocdbt", "base": f"file://{step / 'state'}/"}}
    array = ts.open({**spec, "path": "params.embed"}, open=True).result()  # type: ignore[arg-type]
    value = array[3, 5].read().result().view(np.uint32) ^ np.uint32(1)
    array[3, 5].write(value.view(np.float32)).result()


def large_files(step: Path) -> list[Path]:
    """Those that hold numbers: which of them a read needs depends on how they were written together."""
    files = [path for path in (step / "state" / "ocdbt.process_0" / "d").iterdir() if path.stat().st_size > 4096]
    assert files
    return files


def cut_short(step: Path) -> None:
    for file in large_files(step):
        with file.open("r+b") as content:
            content.truncate(100)


def lose(step: Path) -> None:
    for file in large_files(step):
        file.unlink()


def cut(file: Path, content: str) -> None:
    file.write_text(content)


DAMAGE: dict[str, Callable[[Path], None]] = {
    "a bit of a weight": flip_a_number,
    "a cut file": cut_short,
    "a lost file": lose,
    "a cut table": lambda step: cut(step / "state" / "manifest.ocdbt", ""),
    "a cut place in the input": lambda step: cut(step / "input" / "metadata", '{"at": '),
}


# Where one of tensorstore's reads fails, Orbax closes its loop on the others, which say so from threads of their own
LATE_READS = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


@LATE_READS
@pytest.mark.parametrize("how", DAMAGE)
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_is_used(how: str, phase: Path, tmp_path: Path):
    folder = shutil.copytree(phase, tmp_path / "phase")
    DAMAGE[how](folder / "checkpoints" / "6")
    told: list[str] = []
    with tiny.mesh(fsdp=4, tensor=2):
        like = train_step.abstract_state(decoder.template(C), OPTIMIZER, np.float32)
        with pytest.raises(DamagedError, match=r"checkpoints/6 (cannot be read|is not what was saved: params/embed)"):
            load_model(folder)
        with pytest.raises(DamagedError, match=r"checkpoints/6 (cannot be read|is not what was saved: params/embed)"):
            checkpoint_tensors.check_sums(folder)  # as an export does, without a device
        checkpoint_tensors.check_sums(folder, 4)
        checkpoints = Checkpoints(folder)
        with pytest.raises(DamagedError, match="checkpoints/6"):
            checkpoints.restore(6, like)
        found = restore_newest([checkpoints], like, told.append)
        assert found is not None
        step, state, position = found
        assert (step, int(state.step), position) == (4, 4, {"at": 4})
        assert "checkpoint damaged" in told[0]
        assert (folder / "damaged" / "6").is_dir()
        if how == "a bit of a weight":
            assert "is not what was saved: params/embed;" in told[0]
        checkpoints.save(6, state, {})  # the same step again, in the place of the damaged one
        checkpoints.close()
    assert newest_input(folder) == (6, {})


@LATE_READS
def test_where_all_are_damaged_nothing_is_trained_anew_without_a_word(phase: Path, tmp_path: Path):
    folder = shutil.copytree(phase, tmp_path / "phase")
    for step in (4, 6):
        cut_short(folder / "checkpoints" / str(step))
    with tiny.mesh():
        like = train_step.abstract_state(decoder.template(C), OPTIMIZER, np.float32)
        checkpoints = Checkpoints(folder)
        with pytest.raises(UserError, match=r"all are set aside now: .*damaged/6, .*damaged/4; put"):
            restore_newest([checkpoints], like, lambda _: None)
        assert restore_newest([checkpoints], like, lambda _: None) is None
        checkpoints.close()


def test_sums_see_places_and_not_layouts():
    with tiny.mesh(fsdp=2, tensor=2):
        on_four = integrity.sums(new_state())
    with tiny.mesh():
        state = new_state()
        assert integrity.sums(state) == on_four
        assert integrity.changed(state, on_four) == []
        swapped = dataclasses.replace(state.params, embed=state.params.embed[::-1])
        assert integrity.changed(dataclasses.replace(state, params=swapped), on_four) == ["params/embed"]
        narrow = dataclasses.replace(state.params, embed=state.params.embed.astype(jnp.bfloat16))
        assert integrity.changed(dataclasses.replace(state, params=narrow), on_four) == [], "another dtype: no telling"


# --- what is kept ----------------------------------------------------------------------------------------------------


def test_the_newest_the_best_and_every_so_many_are_kept_over_restarts(tmp_path: Path):
    retention = Retention(keep=1, keep_every=4, keep_best=2)
    losses = {1: 5.0, 2: 1.0, 3: 4.0, 4: 3.0, 5: 2.0, 6: 6.0, 7: 7.0}
    with tiny.mesh():
        state = {"w": tiny.put(tiny.values(C), C).embed}
        for steps in ((1, 2, 3, 4), (5, 6, 7)):  # two calls
            checkpoints = Checkpoints(tmp_path, retention)
            for step in steps:
                checkpoints.save(step, state, {}, losses[step])
            checkpoints.close()
    kept = sorted(int(p.name) for p in (tmp_path / "checkpoints").iterdir() if p.name.isdigit())
    assert kept == [2, 4, 5, 7]
    checkpoints = Checkpoints(tmp_path, retention)
    assert checkpoints.best_step == 2
    checkpoints.close()


@pytest.mark.parametrize("wrong", [{"keep": 0}, {"keep_every": 0}, {"keep_best": -1}])
def test_retention_that_makes_no_sense(wrong: dict[str, int]):
    with pytest.raises(UserError, match="expected keep and keep_every of 1 or more"):
        Retention(**wrong)
