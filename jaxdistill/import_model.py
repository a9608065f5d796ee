"""Hugging Face folder -> checkpoint, tensor by tensor: for a model larger than a host, or many starts from one."""

import dataclasses
from pathlib import Path
from typing import Literal

from rich.console import Console

from jaxdistill import checkpoint, checkpoint_tensors, hf, manifest
from jaxdistill.errors import RunError, UserError
from jaxdistill.hf_tensors import Tensors, check, differing, parts
from jaxdistill.models import decoder


@dataclasses.dataclass(frozen=True, kw_only=True)
class ImportConfig:
    """A Hugging Face folder to be kept as a checkpoint, which train and all other commands take as their model."""

    workdir: Path  # the folder to write, new or empty
    model: Path  # Hugging Face folder
    dtype: Literal["float32", "bfloat16"] | None = None  # of the weights on disk; by default as there
    verify: bool = True  # read the checkpoint back and compare every tensor


def main(config: ImportConfig) -> None:
    """Writes `workdir` as the folder of a training phase, with a checkpoint of step 0.

    Raises:
      UserError: the tensors do not fit config.json, or the workdir holds something.
      RunError: the checkpoint does not hold what the folder does.
    """
    model, phase = config.model, config.workdir
    c, values = hf.read_config(model)
    if phase.exists() and any(phase.iterdir()):
        raise UserError(f"workdir {phase} is not empty; name a new folder, or remove what is there")
    template = decoder.template(c)
    dtype = hf.DTYPES[config.dtype or hf.dtype_of(values)]
    with Tensors(model) as tensors:
        check(template, tensors.shapes(), str(model))
        checkpoint.keep_base(model, phase)
        checkpoint_tensors.write(phase, tensors, template, dtype)
        if config.verify:
            with checkpoint_tensors.open_model(phase) as (written, _):
                wrong = differing(written, tensors, template, dtype)
            if wrong:
                raise RunError(f"{phase}: these tensors differ from {model}: {', '.join(wrong)}; do not use it")
    facts = {"model": checkpoint.fingerprint(model), "verified": config.verify}
    manifest.write_manifest(phase, "import", [model / "config.json"], {"tensors": len(parts(template))}, **facts)
    found = "every tensor read back equal" if config.verify else "not verified"
    Console(stderr=True, markup=False).print(f"imported {model} to {phase}; {found}")
