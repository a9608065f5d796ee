"""Orbax checkpoints of a training run, and how any command opens a model, whether trained here or downloaded."""

import contextlib
import errno
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from jaxdistill import hf, lora, manifest, sharding, weights
from jaxdistill.errors import UserError, disk_full
from jaxdistill.models import decoder
from jaxdistill.models.config import Config
from jaxdistill.models.context import ContextExtension

_FOLDER = "checkpoints"
RESULT = "params"  # the state's field that holds the weights, where a checkpoint names no other
_BASE = "base"  # config and tokenizer of the model trained from, so that a checkpoint stands by itself
_CHUNK_BYTES = 2**28  # of an array, which are read and written as one


class Checkpoints:
    """The checkpoints of one phase: `checkpoints/<step>` under its folder, written in the background."""

    def __init__(self, folder: Path, keep: int = 2):
        self._folder = folder
        self._manager = ocp.CheckpointManager(
            (folder / _FOLDER).absolute(), options=ocp.CheckpointManagerOptions(max_to_keep=keep)
        )

    @property
    def latest_step(self) -> int | None:
        """The newest step that was written whole, or None."""
        return self._manager.latest_step()

    def save(self, step: int, state: Any, input_position: dict[str, Any]) -> None:
        """Starts to write; the devices' memory has been copied when this returns.

        Raises:
          OSError: ENOSPC, before anything is written where it can be foreseen; earlier checkpoints stay usable.
        """
        with _full_disk_named(self._folder):
            self._manager.wait_until_finished()  # its bytes count, and those of what it replaces are free again
            shards = [shard for leaf in jax.tree.leaves(state) for shard in leaf.addressable_shards]
            needed = sum(shard.data.nbytes for shard in shards if shard.replica_id == 0)  # one replica is written
            if shutil.disk_usage(self._folder).free < needed:
                raise disk_full(self._folder)
            self._write(step, state, input_position)

    def _write(self, step: int, state: Any, input_position: dict[str, Any]) -> None:
        saved = ocp.args.StandardSave(state, save_args(state))
        items = ocp.args.Composite(state=saved, input=ocp.args.JsonSave(input_position))
        self._manager.save(step, args=items)

    def restore(self, step: int, like: Any) -> tuple[Any, dict[str, Any]]:
        """The state and the input position of a step, laid out like `like` (arrays or ShapeDtypeStructs)."""
        items = ocp.args.Composite(state=ocp.args.StandardRestore(like), input=ocp.args.JsonRestore())
        found = self._manager.restore(step, args=items)
        return found["state"], found["input"]

    def close(self) -> None:
        """Waits until everything is written. Raises as `save`."""
        with _full_disk_named(self._folder):
            self._manager.wait_until_finished()
            self._manager.close()


def save_args(state: Any) -> Any:
    """How Orbax is to cut a state's arrays: weights that are stacked layer by layer, so that one layer can be read."""

    def one(x: Any) -> ocp.SaveArgs:
        if x.ndim < 2:
            return ocp.SaveArgs()
        return ocp.SaveArgs(chunk_byte_size=_CHUNK_BYTES, shard_axes=(0,) if x.ndim > 2 else ())

    return jax.tree.map(one, state)


@contextlib.contextmanager
def _full_disk_named(folder: Path) -> Iterator[None]:
    """Tensorstore's word for a full disk, said as the operating system says it."""
    try:
        yield
    except ValueError as error:
        if "RESOURCE_EXHAUSTED" not in str(error) and os.strerror(errno.ENOSPC) not in str(error):
            raise
        raise disk_full(folder) from None


def newest_input(phase: Path) -> tuple[int, dict[str, Any]] | None:
    """The newest step of a phase's folder and what it holds about the input; None without a checkpoint."""
    if not (phase / _FOLDER).is_dir():
        return None
    with ocp.CheckpointManager((phase / _FOLDER).absolute()) as manager:
        step = manager.latest_step()
        if step is None:
            return None
        return step, _read_input(manager, step)


def _read_input(manager: ocp.CheckpointManager, step: int) -> dict[str, Any]:
    """What a checkpoint holds beside the state."""
    return manager.restore(step, args=ocp.args.Composite(input=ocp.args.JsonRestore()))["input"]


def keep_base(source: Path, phase: Path, extension: ContextExtension | None = None) -> None:
    """Copies config and tokenizer of the model trained from into the phase's folder, its context extended if asked."""
    target = phase / _BASE
    target.mkdir(parents=True, exist_ok=True)
    if extension is None:
        shutil.copyfile(source / "config.json", target / "config.json")
    else:
        _, values = hf.read_config(source)
        manifest.write_json(target / "config.json", extension.apply(values))
    hf.copy_companions(source, target)


def base_of(model: Path) -> Path:
    """The folder with config.json and tokenizer of a model: itself, or what a training phase kept."""
    return model / _BASE if (model / _FOLDER).is_dir() else model


def fingerprint(model: Path, step: int | None = None) -> str:
    """Names the weights that `load_model` reads (manifest.weights_fingerprint), after the step where there is one.

    Raises:
      UserError: as `load_model`.
    """
    base = base_of(model)
    hf.read_config(base)
    if (model / _FOLDER).is_dir():
        with ocp.CheckpointManager((model / _FOLDER).absolute()) as manager:
            step = _whole_step(manager, model, step)
        folder, prefix = model / _FOLDER / str(step), f"step {step} "
        files = sorted(path for path in folder.rglob("*") if path.is_file())
    else:
        folder, prefix, files = model, "", sorted(model.glob("*.safetensors"))
    return prefix + manifest.weights_fingerprint(base / "config.json", folder, files)


def steps_folder(phase: Path) -> Path:
    """Where a phase's checkpoints lie, a folder a step."""
    return (phase / _FOLDER).absolute()


def locate(model: Path, step: int | None = None) -> tuple[Path, dict[str, Any]] | None:
    """The folder of a checkpoint's arrays, and what it holds beside them; None for a Hugging Face folder.

    Raises:
      UserError: the phase has no such checkpoint.
    """
    if not (model / _FOLDER).is_dir():
        return None
    with ocp.CheckpointManager((model / _FOLDER).absolute()) as manager:
        step = _whole_step(manager, model, step)
        return model / _FOLDER / str(step) / "state", _read_input(manager, step)


def _whole_step(manager: ocp.CheckpointManager, model: Path, step: int | None) -> int:
    steps = manager.all_steps()
    step = max(steps, default=None) if step is None else step
    if step is None or step not in steps:
        wanted = "whole checkpoint" if step is None else f"checkpoint of step {step}"
        raise UserError(f"{model} has no {wanted}; found {sorted(steps) or 'none'}")
    return step


def load_model(model: Path, step: int | None = None, dtype: Any = np.float32) -> tuple[decoder.Params, Config]:
    """Weights in storage layout on the current mesh, from a Hugging Face folder or a training phase's folder.

    Args:
      step: of a training phase; the newest by default.
      dtype: of the weights in memory.

    Raises:
      UserError: the path is neither, or the phase has no such checkpoint.
    """
    if not (model / _FOLDER).is_dir():
        return hf.load(model, dtype)
    config, _ = hf.read_config(base_of(model))
    with ocp.CheckpointManager((model / _FOLDER).absolute()) as manager:
        step = _whole_step(manager, model, step)
        sharding.check_divisible(config.sizes(), dict(jax.sharding.get_mesh().shape))
        found = _read_input(manager, step)
        result = found.get("result", RESULT)  # the state's field: the weights or their average
        adapters = lora.from_json(found["lora"]["config"]) if "lora" in found else None
        template: Any = decoder.template(config)
        if adapters is None:
            wanted = {result: weights.abstract(template, dtype)}
        else:
            wanted = {result: weights.abstract(lora.template(adapters, template))}
        layouts = ocp.checkpoint_utils.construct_restore_args(wanted)
        items = ocp.args.Composite(state=ocp.args.PyTreeRestore(wanted, restore_args=layouts, partial_restore=True))
        params = manager.restore(step, args=items)["state"][result]
    if adapters is None:
        return params, config
    base, _ = load_model(adapted(model, found), found["lora"]["step"], dtype)
    return lora.merge(base, params, adapters), config


def adapted(phase: Path, found: dict[str, Any]) -> Path:
    """The model that a phase's adapters belong to, by what a checkpoint of it holds.

    Raises:
      UserError: it is no longer there.
    """
    model = Path(found["lora"]["model"])
    if not model.is_dir():
        raise UserError(f"{phase} holds adapters of {model}, which is not there; put the model back")
    return model
