"""Checkpoint -> Hugging Face folder, reloaded and compared before it is called done."""

import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import jinja2
import numpy as np
from jaxtyping import Array
from rich.console import Console

from jaxdistill import hf, manifest, sharding
from jaxdistill.checkpoint import base_of, fingerprint, load_model
from jaxdistill.data import chat
from jaxdistill.errors import RunError, UserError
from jaxdistill.models import decoder
from jaxdistill.models.config import Config
from jaxdistill.sharding import MeshConfig

_CARD = Path(__file__).with_name("model_card.md.jinja")
_LOGIT_LIMIT = 1e-4  # of the largest logit, where the export does not round; rounding has its own error


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExportConfig:
    """A checkpoint to be written as a Hugging Face folder."""

    workdir: Path  # the folder to write: new, empty, or an earlier export
    model: Path  # a phase folder of a training run, or a Hugging Face folder
    step: int | None = None  # checkpoint of the phase; the newest by default
    dtype: str | None = None  # of the tensors, "float32" or "bfloat16"; by default as in the model trained from
    verify: bool = True  # reload it and compare; needs memory for a second copy of the weights
    verify_tokens: int = 256  # positions of the logits check
    mesh: MeshConfig = MeshConfig()


def main(config: ExportConfig) -> float | None:
    """Exports and verifies; returns the largest logit difference over the largest logit, None if it was not looked at.

    Raises:
      UserError: the target would overwrite its own source, or a folder that is no export.
      RunError: the export does not hold what was trained.
    """
    model, folder = config.model, config.workdir
    if folder.resolve() == base_of(model).resolve():
        raise UserError(f"workdir is {folder}, the folder that the model comes from; export to another one")
    _check_target(folder)
    facts = {"settings": dataclasses.asdict(config), "model": fingerprint(model, config.step)}
    inputs = [base_of(model) / "config.json"]
    with jax.set_mesh(config.mesh.build()):
        params, c = load_model(model, config.step)
        # Before the first file: an export that is cut off may be repeated, and is not taken for a verified one
        manifest.write_manifest(folder, "export", inputs, {}, verified=False, **facts)
        hf.save(folder, params, hf.read_config(base_of(model))[1], config.dtype)
        hf.copy_companions(base_of(model), folder)
        hf.write_end_tokens(folder, chat.end_tokens(chat.load_tokenizer(folder), folder))
        error = verify(folder, params, c, config.verify_tokens) if config.verify else None
    found = "not verified" if error is None else f"reloaded: tensors equal, logits within {error:.1e} of the largest"
    card = model_card(folder.resolve().name, model, facts["model"], found)
    (folder / "README.md").write_text(card, encoding="utf-8")
    files = [p for p in folder.iterdir() if p.name != "manifest.json"]
    seen = {"verified": error is not None, "logit_error": error}
    manifest.write_manifest(folder, "export", inputs, {"files": len(files)}, **seen, **facts)
    Console(stderr=True, markup=False).print(f"exported {model} to {folder}; {found}")
    return error


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


def verify(folder: Path, params: decoder.Params, c: Config, tokens: int) -> float:
    """Reloads an export and compares it with the model that was exported, its architecture included.

    Returns:
      The largest difference of logits over the largest logit, against the weights before they were rounded to the
      export's dtype.

    Raises:
      RunError: a tensor is not the trained one, rounded once; or the architecture or the logits of the export are
        others, as they are where a reader of config.json loses a RoPE setting.
    """
    reloaded, found = hf.load(folder)
    _, written = hf.read_config(folder)
    dtype = jnp.dtype(written["dtype"])
    same = jax.tree.map(lambda a, b: bool(jnp.array_equal(a.astype(dtype).astype(b.dtype), b)), params, reloaded)
    wrong = [jax.tree_util.keystr(path) for path, equal in jax.tree_util.tree_leaves_with_path(same) if not equal]
    if wrong:
        raise RunError(f"{folder}: these weights differ from the checkpoint: {', '.join(wrong)}; do not use the export")
    if found != c:
        fields = [f.name for f in dataclasses.fields(c) if getattr(c, f.name) != getattr(found, f.name)]
        raise RunError(f"{folder}: config.json says another {', '.join(fields)} than the model; do not use the export")
    generator = np.random.default_rng(0)
    mesh = dict(jax.sharding.get_mesh().shape)
    chunks = 2 * mesh["context"]
    shape = (mesh["data"] * mesh["fsdp"], -(-min(tokens, c.max_positions) // chunks) * chunks)
    ids = generator.integers(0, c.vocab, shape).astype(np.int32)
    before, after = logits(params, ids, c), logits(reloaded, ids, found)
    error = float(np.abs(before - after).max() / np.abs(before).max())
    if not error <= (_LOGIT_LIMIT if dtype == jnp.float32 else 1.0):  # not >: a NaN must not pass
        raise RunError(f"{folder}: its logits differ by {error:.1e} of the largest; do not use the export")
    return error


def logits(params: decoder.Params, ids: np.ndarray, c: Config) -> np.ndarray:
    """Float32 logits [B, T, V], on the host, of plain rows [B, T] of one document each."""

    @jax.jit
    def run(params: decoder.Params, ids: Array, positions: Array) -> Array:
        x = decoder.hidden(params, ids, positions, jnp.ones_like(ids), c, jnp.float32, "none")
        return sharding.replicate(decoder.logits(params, x))

    order = sharding.row_order(ids.shape[1], jax.sharding.get_mesh().shape["context"])
    rows = [sharding.put(x.astype(np.int32), "BT") for x in (ids[:, order], np.broadcast_to(order, ids.shape))]
    with jax.default_matmul_precision("highest"):
        found = np.asarray(run(params, *rows))
    return found[:, np.argsort(order)]
