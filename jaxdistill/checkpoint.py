"""How any command opens a model, whether trained here or downloaded, and what a phase's folder keeps for that."""

import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from jaxdistill import hf, integrity, lora, manifest, sharding, weights
from jaxdistill.checkpoint_damage import attempt, refuse
from jaxdistill.checkpoint_store import FOLDER, RESULT, read_input
from jaxdistill.errors import UserError
from jaxdistill.models import decoder
from jaxdistill.models.config import Config
from jaxdistill.models.context import ContextExtension

_BASE = "base"  # config and tokenizer of the model trained from, so that a checkpoint stands by itself


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
    return model / _BASE if (model / FOLDER).is_dir() else model


def fingerprint(model: Path, step: int | None = None) -> str:
    """Names the weights that `load_model` reads (manifest.weights_fingerprint), after the step where there is one.

    Raises:
      UserError: as `load_model`.
    """
    base = base_of(model)
    hf.read_config(base)
    if (model / FOLDER).is_dir():
        with ocp.CheckpointManager((model / FOLDER).absolute()) as manager:
            step = _whole_step(manager, model, step)
        folder, prefix = model / FOLDER / str(step), f"step {step} "
        files = sorted(path for path in folder.rglob("*") if path.is_file())
    else:
        folder, prefix, files = model, "", sorted(model.glob("*.safetensors"))
    return prefix + manifest.weights_fingerprint(base / "config.json", folder, files)


def steps_folder(phase: Path) -> Path:
    """Where a phase's checkpoints lie, a folder a step."""
    return (phase / FOLDER).absolute()


def locate(model: Path, step: int | None = None) -> tuple[Path, dict[str, Any]] | None:
    """The folder of a checkpoint's arrays, and what it holds beside them; None for a Hugging Face folder.

    Raises:
      UserError: the phase has no such checkpoint.
    """
    if not (model / FOLDER).is_dir():
        return None
    with ocp.CheckpointManager((model / FOLDER).absolute()) as manager:
        step = _whole_step(manager, model, step)
        return model / FOLDER / str(step) / "state", read_input(manager, model, step)


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
      DamagedError: it cannot be read. Weights read in another dtype than they were saved in are not held against the
        sums of those.
    """
    if not (model / FOLDER).is_dir():
        return hf.load(model, dtype)
    config, _ = hf.read_config(base_of(model))
    with ocp.CheckpointManager((model / FOLDER).absolute()) as manager:
        step = _whole_step(manager, model, step)
        sharding.check_divisible(config.sizes(), dict(jax.sharding.get_mesh().shape))
        found = read_input(manager, model, step)
        result = found.get("result", RESULT)  # the state's field: the weights or their average
        adapters = lora.from_json(found["lora"]["config"]) if "lora" in found else None
        template: Any = decoder.template(config)
        if adapters is None:
            wanted = {result: weights.abstract(template, dtype)}
        else:
            wanted = {result: weights.abstract(lora.template(adapters, template))}
        layouts = ocp.checkpoint_utils.construct_restore_args(wanted)
        items = ocp.args.Composite(state=ocp.args.PyTreeRestore(wanted, restore_args=layouts, partial_restore=True))
        place = model / FOLDER / str(step)
        read = attempt(place, lambda: manager.restore(step, args=items)["state"])
    refuse(place, integrity.changed(read, found.get("sums", {})))
    if adapters is None:
        return read[result], config
    base, _ = load_model(adapted(model, found), found["lora"]["step"], dtype)
    return lora.merge(base, read[result], adapters), config


def adapted(phase: Path, found: dict[str, Any]) -> Path:
    """The model that a phase's adapters belong to, by what a checkpoint of it holds.

    Raises:
      UserError: it is no longer there.
    """
    model = Path(found["lora"]["model"])
    if not model.is_dir():
        raise UserError(f"{phase} holds adapters of {model}, which is not there; put the model back")
    return model
