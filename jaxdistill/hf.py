"""Hugging Face folders: config.json and safetensors, read into sharded weights and written back bit for bit."""

import contextlib
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
import safetensors
import safetensors.numpy
from einops import rearrange
from jaxtyping import Int

from jaxdistill import models, sharding, weights
from jaxdistill.errors import UserError
from jaxdistill.models import decoder
from jaxdistill.models.config import Config, write_rope

_SHARD_BYTES = 2 * 1000**3
_INDEX = "model.safetensors.index.json"
_DTYPES = {"bfloat16": ml_dtypes.bfloat16, "float16": np.float16, "float32": np.float32}


def read_config(folder: Path) -> tuple[Config, dict[str, Any]]:
    """The architecture of a Hugging Face folder, and its config.json as it stands.

    Raises:
      UserError: no such folder, no config.json, an unknown model_type, or an unsupported setting.
    """
    path = folder / "config.json"
    if not path.is_file():
        found = "the folder exists" if folder.is_dir() else "there is no such folder"
        raise UserError(f"{path} not found ({found}); expected a Hugging Face model folder")
    hf = _read_json(path)
    return models.family(str(hf.get("model_type"))).config(hf), hf


def _read_json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise UserError(f"{path} is not valid JSON ({error}); download it again") from None
    if not isinstance(values, dict):
        raise UserError(f"{path} holds a JSON {type(values).__name__}, expected an object")
    return values


class Tensors(contextlib.AbstractContextManager):
    """The tensors of a folder by name, whether in one safetensors file or in several with an index; read on demand."""

    def __init__(self, folder: Path):
        self._open = contextlib.ExitStack()
        index, single = folder / _INDEX, folder / "model.safetensors"
        if index.is_file():
            file_of = _read_json(index).get("weight_map", {})
        elif single.is_file():
            with _safe_open(single) as file:
                file_of = dict.fromkeys(file.keys(), single.name)
        else:
            raise UserError(f"{folder} holds neither model.safetensors nor {_INDEX}; expected Hugging Face weights")
        lost = sorted(name for name in set(file_of.values()) if not (folder / name).is_file())
        if lost:
            raise UserError(f"{folder}: {_INDEX} names files that are not there: {', '.join(lost)}")
        files = {name: self._open.enter_context(_safe_open(folder / name)) for name in sorted(set(file_of.values()))}
        held = {file: set(opened.keys()) for file, opened in files.items()}
        self._file = {name: files[file] for name, file in file_of.items() if name in held[file]}

    def __exit__(self, *exception: object) -> None:
        self._open.close()

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of every tensor, without reading the data."""
        return {name: tuple(file.get_slice(name).get_shape()) for name, file in self._file.items()}

    def __getitem__(self, name: str) -> np.ndarray:
        return self._file[name].get_tensor(name)


def _safe_open(path: Path) -> Any:
    try:
        return safetensors.safe_open(path, framework="numpy")
    except safetensors.SafetensorError as error:
        raise UserError(f"{path} is not a readable safetensors file ({error}); download it again") from None


def check(template: decoder.Params, found: Mapping[str, tuple[int, ...]], where: str) -> None:
    """Compares the tensors a model needs with those a folder has.

    Raises:
      UserError: tensors are missing, extra or misshapen; every one of them is named.
    """
    needed: dict[str, tuple[int, ...]] = {}
    for w in jax.tree.leaves(template, is_leaf=weights.is_declared):
        for name in _names(w):
            needed[name] = w.hf_shape
    tied = {"lm_head.weight"} if template.unembed is None else set()  # some exporters write the shared matrix twice
    problems = [f"missing {name} {list(needed[name])}" for name in sorted(needed.keys() - found.keys())]
    extra = {name for name in found.keys() - needed.keys() - tied if not name.endswith(_DERIVED)}
    problems += [f"unexpected {name} {list(found[name])}" for name in sorted(extra)]
    problems += [
        f"{name} is {list(found[name])}, expected {list(needed[name])}"
        for name in sorted(needed.keys() & found.keys())
        if found[name] != needed[name]
    ]
    if problems:
        raise UserError(f"{where}: the tensors do not fit config.json:\n  " + "\n  ".join(problems))


_DERIVED = ".rotary_emb.inv_freq"  # old Llama exports hold what config.json says already; transformers skips it too


def _names(w: weights.Declared) -> list[str]:
    """The Hugging Face names of a weight: one a layer where layers are stacked."""
    return [w.hf_name.format(i) for i in range(w.shape[0])] if w.dims.startswith("L") else [w.hf_name]


def load(folder: Path, dtype: Any = np.float32) -> tuple[decoder.Params, Config]:
    """Reads a model in storage layout on the current mesh; the host holds one tensor of one layer at a time.

    Args:
      dtype: of the weights in memory; float32 holds bfloat16 and float16 checkpoints exactly.
    """
    config, _ = read_config(folder)
    sharding.check_divisible(config.sizes(), dict(jax.sharding.get_mesh().shape))
    template = decoder.template(config)
    with Tensors(folder) as tensors:
        check(template, tensors.shapes(), str(folder))

        def one(w: weights.Declared) -> jax.Array:
            sizes = dict(zip(w.dims, w.shape, strict=True))
            axes = {letter: sizes[letter] for letter in w.layer_dims.split()}
            layers = (
                sharding.put(
                    rearrange(tensors[name], f"{w.hf_dims} -> {w.layer_dims}", **axes).astype(dtype),
                    w.dims.removeprefix("L"),
                    sharding.STORAGE,
                )
                for name in _names(w)
            )
            if not w.dims.startswith("L"):
                return next(layers)
            stacked = jnp.zeros(w.shape, dtype, out_sharding=sharding.spec(w.dims, sharding.STORAGE))
            for i, layer in enumerate(layers):
                stacked = _fill(stacked, layer, i)
            return stacked

        return jax.tree.map(one, template, is_leaf=weights.is_declared), config


@functools.partial(jax.jit, donate_argnums=0)
def _fill(stacked: jax.Array, layer: jax.Array, i: Int[jax.Array, ""]) -> jax.Array:
    """The weight of all layers with one of them put in, in the same memory."""
    return stacked.at[i].set(layer)


@jax.jit
def _one_layer(stacked: jax.Array, i: Int[jax.Array, ""]) -> jax.Array:
    """One layer of a weight, on every device."""
    return stacked.at[i].get(out_sharding=jax.P())


def save(folder: Path, params: decoder.Params, hf: Mapping[str, Any], dtype: str | None = None) -> None:
    """Writes config.json and the weights of a model; `copy_companions` adds the tokenizer.

    Args:
      hf: config.json of the model trained from; RoPE is written in both schemas whatever this one has.
      dtype: "float32" or "bfloat16" of the tensors on disk; by default that of the config.

    Raises:
      UserError: the dtype is neither.
    """
    dtype = dtype or str(hf.get("dtype") or hf.get("torch_dtype") or "float32")
    if dtype not in _DTYPES:
        raise UserError(f"cannot write tensors as {dtype!r}; expected one of {', '.join(_DTYPES)}")
    folder.mkdir(parents=True, exist_ok=True)
    config = models.family(str(hf.get("model_type"))).config(hf)
    _write_shards(folder, _tensors_of(params, config, _DTYPES[dtype]))
    written = {**write_rope(hf), "dtype": dtype, "torch_dtype": dtype}
    (folder / "config.json").write_text(json.dumps(written, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _tensors_of(params: decoder.Params, config: Config, dtype: Any) -> Iterator[tuple[str, np.ndarray]]:
    """Every tensor under its Hugging Face name, one in host memory at a time."""
    template = decoder.template(config)
    declared = jax.tree.leaves(template, is_leaf=weights.is_declared)
    for w, values in zip(declared, jax.tree.leaves(params), strict=True):
        stacked = w.dims.startswith("L")
        for i, name in enumerate(_names(w)):
            layer = np.asarray(_one_layer(values, i) if stacked else sharding.replicate(values)).astype(dtype)
            yield name, np.ascontiguousarray(rearrange(layer, f"{w.layer_dims} -> {w.hf_dims}"))


def _write_shards(folder: Path, tensors: Iterator[tuple[str, np.ndarray]]) -> None:
    """Writes safetensors files of at most about 2 GB, with an index where there are several.

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
        if held and held + values.nbytes > _SHARD_BYTES:
            flush()
            held = 0
        shards[0][name] = values
        held += values.nbytes
        total += values.nbytes
    flush()
    for stale in (folder / _INDEX, *folder.glob("model*.safetensors")):  # an old index would hide a new single file
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
    (folder / _INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")


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
