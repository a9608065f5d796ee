"""Checkpoint -> Hugging Face folder, reloaded and compared before it is called done."""

import dataclasses
import json
from pathlib import Path

import jax
import jinja2
import numpy as np
from rich.console import Console

from jaxdistill import hf, lora, manifest, publish
from jaxdistill.checkpoint import base_of, fingerprint
from jaxdistill.checkpoint_tensors import check_sums, open_adapters, open_model
from jaxdistill.data import chat
from jaxdistill.errors import RunError, UserError
from jaxdistill.export_check import check
from jaxdistill.sharding import MeshConfig

_CARD = Path(__file__).with_name("model_card.md.jinja")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExportConfig:
    """A checkpoint to be written as a Hugging Face folder."""

    workdir: Path  # the folder to write: new, empty, or an earlier export
    model: Path  # a phase folder of a training run, or a Hugging Face folder
    step: int | None = None  # checkpoint of the phase; the newest by default
    adapters: bool = False  # those of a phase with lora.rank alone, in PEFT's format; by default they are merged
    adapters_base: str = ""  # the model under the adapters, as PEFT is to find it: a folder, or a name on the hub; by
    # default the folder trained from
    dtype: str | None = None  # of the tensors, "float32" or "bfloat16"; by default as in the model trained from
    max_shard_gb: float = hf.SHARD_BYTES / 1e9  # of a file of weights; one such file is held in memory at a time
    verify: bool = True  # reload it and compare: every tensor, logits, and greedy text where the model fits in memory
    verify_tokens: int = 256  # of the logits check, spread over its positions
    verify_positions: int = 8192  # of the logits check, or as many as the model has
    push_to_hub: str = ""  # OWNER/NAME of a model on the Hugging Face hub, to which the folder is uploaded
    public: bool = False  # let everyone see it there; private by default
    dry_run: bool = False  # of the upload: list its files alone
    mesh: MeshConfig = MeshConfig()

    def __post_init__(self):
        if self.max_shard_gb <= 0:
            raise UserError(f"max_shard_gb is {self.max_shard_gb}; expected a positive number of gigabytes")
        if self.adapters_base and not self.adapters:
            raise UserError(f"adapters_base is {self.adapters_base}; expected with --adapters alone")


def main(config: ExportConfig) -> float | None:
    """Exports, verifies and, if asked, uploads; returns the largest logit difference over the largest logit.

    None is returned if logits were not looked at. The weights go from file to file, a tensor at a time; what is held of
    them is the file that is being written.

    Raises:
      UserError: the target would overwrite its own source, or a folder that is no export; as `publish.push`.
      RunError: the checkpoint is damaged, or the export does not hold what was trained; as `publish.push`.
    """
    if config.push_to_hub:
        publish.check(config.push_to_hub, config.dry_run)
    error = _export(config)
    if config.push_to_hub:
        upload = publish.Upload(repo=config.push_to_hub, kind="model", files=publish.files_of(config.workdir))
        publish.push(upload, config.public, config.dry_run)
    return error


def _export(config: ExportConfig) -> float | None:
    model, folder = config.model, config.workdir
    if folder.resolve() == base_of(model).resolve():
        raise UserError(f"workdir is {folder}, the folder that the model comes from; export to another one")
    _check_target(folder)
    check_sums(model, config.step)
    if config.adapters:
        return _export_adapters(config)
    facts = {"settings": dataclasses.asdict(config), "model": fingerprint(model, config.step)}
    inputs = [base_of(model) / "config.json"]
    with jax.set_mesh(config.mesh.build()), open_model(model, config.step) as (tensors, c):
        # Before the first file: an export that is cut off may be repeated, and is not taken for a verified one
        manifest.write_manifest(folder, "export", inputs, {}, verified=False, **facts)
        hf.write(folder, tensors, hf.read_config(base_of(model))[1], config.dtype, round(config.max_shard_gb * 1e9))
        hf.copy_companions(base_of(model), folder)
        hf.write_end_tokens(folder, chat.end_tokens(chat.load_tokenizer(folder), folder))
        seen = None
        if config.verify:
            seen = check(folder, model, config.step, tensors, c, config.verify_tokens, config.verify_positions)
    found = "not verified" if seen is None else str(seen)
    card = model_card(folder.resolve().name, model, facts["model"], found)
    (folder / "README.md").write_text(card, encoding="utf-8")
    files = [p for p in folder.iterdir() if p.name != "manifest.json"]
    outcome = {"verified": seen is not None, "logit_error": seen.logit_error if seen else None, "check": found}
    manifest.write_manifest(folder, "export", inputs, {"files": len(files)}, **outcome, **facts)
    Console(stderr=True, markup=False).print(f"exported {model} to {folder}; {found}")
    return seen.logit_error if seen else None


def _export_adapters(config: ExportConfig) -> None:
    """Writes the adapters of a phase in PEFT's format, and reads them back.

    Raises:
      UserError: the phase extended the model's context, which the adapters alone do not tell; or PEFT could not open
        the model that they belong to.
      RunError: what was written is not what the checkpoint holds.
    """
    model, folder = config.model, config.workdir
    tensors, declared, c, base = open_adapters(model, config.step)
    own, of_base = (hf.read_config(base_of(path))[0] for path in (model, base))
    if own != of_base:
        raise UserError(
            f"{model} was trained for {own.max_positions:,} positions ({own.rope}), {base} is made for "
            f"{of_base.max_positions:,}: PEFT's format has no place for that, and who loads the adapters would run "
            "them with the old positions; export the merged model, without adapters"
        )
    if not config.adapters_base and base_of(base) != base:
        raise UserError(
            f"the adapters of {model} belong to {base}, a phase of training, which PEFT cannot open; export that phase "
            "too, and say where PEFT finds it with --adapters-base FOLDER, or export the merged model, without adapters"
        )
    facts = {"settings": dataclasses.asdict(config), "model": fingerprint(model, config.step)}
    inputs = [base_of(model) / "config.json"]
    manifest.write_manifest(folder, "export", inputs, {}, verified=False, **facts)
    lora.save(folder, tensors, declared, c, config.adapters_base or str(base))
    hf.copy_companions(base_of(model), folder)
    if config.verify:
        with lora.opened(folder) as written:
            wrong = [name for name in tensors.shapes() if not np.array_equal(written[name], tensors[name])]
        if wrong:
            raise RunError(f"{folder}: these tensors differ from the checkpoint's: {', '.join(wrong)}; do not use them")
    found = "reloaded: every tensor equal" if config.verify else "not verified"
    manifest.write_manifest(folder, "export", inputs, {}, verified=config.verify, check=found, **facts)
    Console(stderr=True, markup=False).print(f"exported the adapters of {model} to {folder}; {found}")


def model_card(name: str, model: Path, weights: str, found: str) -> str:
    """The README.md of an export: what it was trained from and on, as the run's manifest says, and how it was checked.

    Args:
      weights: fingerprint of those that were exported.
      found: what became of the check.
    """
    path = model.parent / "manifest.json"
    run = json.loads(path.read_bytes()) if base_of(model) != model and path.is_file() else None
    template = jinja2.Template(
        _CARD.read_text(encoding="utf-8"),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        keep_trailing_newline=True,
    )
    values = {"name": name, "phase": model.name, "weights": weights, "found": found, "run": run}
    return template.render(commit=manifest.commit(), **values)


def _check_target(folder: Path) -> None:
    """Refuses to write among files that no export wrote."""
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return
    try:
        earlier = json.loads((folder / "manifest.json").read_bytes())
    except (OSError, ValueError):
        earlier = None
    if not isinstance(earlier, dict) or earlier.get("command") != "export":
        raise UserError(
            f"workdir {folder} holds files that no export wrote; name a new folder, or remove what is there"
        )
