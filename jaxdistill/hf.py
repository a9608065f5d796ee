"""Hugging Face folders: config.json and safetensors, read into sharded weights and written back bit for bit."""

import functools
import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import safetensors.numpy
from jaxtyping import Int

from jaxdistill import models, sharding, weights
from jaxdistill.errors import UserError
from jaxdistill.hf_tensors import INDEX, Source, Stacked, Tensors, check, homes, parts, read_json, read_layer
from jaxdistill.models import decoder
from jaxdistill.models.config import Config, write_rope

SHARD_BYTES = 2 * 1000**3  # of a file of weights: what is held at once while a folder is written
DTYPES = {"bfloat16": ml_dtypes.bfloat16, "float16": np.float16, "float32": np.float32}


def read_config(folder: Path) -> tuple[Config, dict[str, Any]]:
    """The architecture of a Hugging Face folder, and its config.json as it stands.

    Raises:
      UserError: no such folder, no config.json, an unknown model_type, or an unsupported setting.
    """
    path = folder / "config.json"
    if not path.is_file():
        found = "the folder exists" if folder.is_dir() else "there is no such folder"
        raise UserError(f"{path} not found ({found}); expected a Hugging Face model folder")
    hf = read_json(path)
    return models.family(str(hf.get("model_type"))).config(hf), hf


def dtype_of(hf: Mapping[str, Any]) -> str:
    """The dtype of a folder's tensors, as its config.json says."""
    return str(hf.get("dtype") or hf.get("torch_dtype") or "float32")


def load(folder: Path, dtype: Any = np.float32) -> tuple[decoder.Params, Config]:
    """Reads a model in storage layout on the current mesh; the host holds one weight of one layer at a time.

    Args:
      dtype: of the weights in memory; float32 holds bfloat16 and float16 checkpoints exactly.
    """
    config, _ = read_config(folder)
    sharding.check_divisible(config.sizes(), dict(jax.sharding.get_mesh().shape))
    template = decoder.template(config)
    with Tensors(folder) as tensors:
        check(template, tensors.shapes(), str(folder))
        return load_tensors(tensors, template, dtype), config


def load_tensors(tensors: Source, template: Any, dtype: Any = np.float32, layer: int | None = None) -> Any:
    """The weights that a template declares, in storage layout on the current mesh.

    Args:
      layer: of stacked weights, to have this one alone.
    """
    stacked: dict[int, jax.Array] = {}
    declared, tree = jax.tree.flatten(template, is_leaf=weights.is_declared)
    for (leaf, i), pieces in homes(template).items():
        if layer is not None and i != layer:
            continue
        w = declared[leaf]
        own = w.dims.removeprefix("L")
        values = sharding.put(read_layer(tensors, pieces).astype(dtype), own, sharding.STORAGE)
        if i is None or layer is not None:
            stacked[leaf] = values
            continue
        if leaf not in stacked:
            layout = sharding.spec(w.dims, sharding.STORAGE)
            stacked[leaf] = jnp.zeros(w.shape, dtype, out_sharding=layout)
        stacked[leaf] = _fill(stacked[leaf], values, i)
    return jax.tree.unflatten(tree, [stacked[leaf] for leaf in range(len(declared))])


@functools.partial(jax.jit, donate_argnums=0)
def _fill(stacked: jax.Array, layer: jax.Array, i: Int[jax.Array, ""]) -> jax.Array:
    """The weight of all layers with one of them put in, in the same memory."""
    return stacked.at[i].set(layer)


@jax.jit
def _one_layer(stacked: jax.Array, i: Int[jax.Array, ""]) -> jax.Array:
    """One layer of a weight, on every device."""
    return stacked.at[i].get(out_sharding=jax.P())


def save(
    folder: Path,
    params: decoder.Params,
    hf: Mapping[str, Any],
    dtype: str | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """As `write`, of a model that is on the devices; one tensor is on the host at a time."""
    template, leaves = decoder.template(models.family(str(hf.get("model_type"))).config(hf)), jax.tree.leaves(params)

    def read(leaf: int, index: Any) -> np.ndarray:
        return np.asarray(sharding.replicate(leaves[leaf]) if index is ... else _one_layer(leaves[leaf], index))

    write(folder, Stacked(template, read), hf, dtype, shard_bytes)


def write(
    folder: Path, tensors: Source, hf: Mapping[str, Any], dtype: str | None = None, shard_bytes: int = SHARD_BYTES
) -> None:
    """Writes config.json and the weights of a model, file by file; `copy_companions` adds the tokenizer.

    Args:
      tensors: those that the model needs, and perhaps others.
      hf: config.json of the model trained from; RoPE is written in both schemas whatever this one has.
      dtype: "float32" or "bfloat16" of the tensors on disk; by default that of the config.
      shard_bytes: of a file at most, or one tensor's.

    Raises:
      UserError: the dtype is neither.
    """
    dtype = dtype or dtype_of(hf)
    if dtype not in DTYPES:
        raise UserError(f"cannot write tensors as {dtype!r}; expected one of {', '.join(DTYPES)}")
    folder.mkdir(parents=True, exist_ok=True)
    family = models.family(str(hf.get("model_type")))
    template = decoder.template(family.config(hf))
    converted = ((name, tensors[name].astype(DTYPES[dtype], copy=False)) for name in parts(template))
    _write_shards(folder, converted, shard_bytes)
    spelled = getattr(family, "write_config", write_rope)(hf)  # some families spell more in two ways
    written = {**spelled, "dtype": dtype, "torch_dtype": dtype}
    (folder / "config.json").write_text(json.dumps(written, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _write_shards(folder: Path, tensors: Iterator[tuple[str, np.ndarray]], shard_bytes: int) -> None:
    """Writes safetensors files of at most so many bytes of tensors, with an index where there are several.

    Weights that are already there are replaced only when all of the new ones are on disk.
    """
    for left in folder.glob("model-*.partial"):  # of an export that was cut off
        left.unlink()
    shards: list[dict[str, np.ndarray]] = [{}]
    written: list[tuple[Path, list[str]]] = []
    total = held = 0

    def flush() -> None:
        path = folder / f"model-{len(written) + 1:05d}.partial"
        safetensors.numpy.save_file(shards[0], path, metadata={"format": "pt"})
        written.append((path, list(shards[0])))
        shards[0] = {}

    for name, values in tensors:
        if held and held + values.nbytes > shard_bytes:
            flush()
            held = 0
        shards[0][name] = values
        held += values.nbytes
        total += values.nbytes
    flush()
    for stale in (folder / INDEX, *folder.glob("model*.safetensors")):  # an old index would hide a new single file
        stale.unlink(missing_ok=True)
    if len(written) == 1:
        written[0][0].rename(folder / "model.safetensors")
        return
    weight_map = {}
    for number, (path, names) in enumerate(written, start=1):
        final = f"model-{number:05d}-of-{len(written):05d}.safetensors"
        path.rename(folder / final)
        weight_map |= dict.fromkeys(names, final)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")


_COMPANIONS = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template*",
)


def write_end_tokens(folder: Path, ids: Sequence[int]) -> None:
    """Puts every end token into generation_config.json: transformers and servers stop on these, not on the template's.

    A base model's own file names its document end alone, and generation would run past each answer it was taught.
    """
    path = folder / "generation_config.json"
    values = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    path.write_text(json.dumps({**values, "eos_token_id": list(ids)}, indent=2) + "\n", encoding="utf-8")


def copy_companions(source: Path, folder: Path) -> None:
    """Copies tokenizer, chat template and generation settings."""
    for pattern in (*_COMPANIONS, "generation_config.json"):
        for path in filter(Path.is_file, source.glob(pattern)):
            shutil.copyfile(path, folder / path.name)
