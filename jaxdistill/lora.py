"""Adapters outside of training: added to a model's tensors, and read and written in PEFT's format."""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy
from einops import rearrange
from jaxtyping import Int

from jaxdistill import hf, sharding, weights
from jaxdistill.errors import UserError
from jaxdistill.hf_tensors import Part, Source, Tensors, check, parts, read_json
from jaxdistill.models import decoder
from jaxdistill.models.lora import PEFT, Adapter, Adapters, LoraConfig, template

_WEIGHTS, _CONFIG = "adapter_model.safetensors", "adapter_config.json"


def from_json(values: Mapping[str, Any]) -> LoraConfig:
    """The configuration that a checkpoint holds."""
    return LoraConfig(**{**values, "weights": tuple(values["weights"]), "start": None})


# --- merged ----------------------------------------------------------------------------------------------------------


def _added(a: np.ndarray, b: np.ndarray, c: LoraConfig) -> np.ndarray:
    """What an adapter adds to one layer of its weight, float32 [in, out]; on the host, the same for all."""
    return np.float32(c.scale) * np.tensordot(a.astype(np.float32), b.astype(np.float32), 1)


def merge(params: decoder.Params, adapters: Adapters, c: LoraConfig) -> decoder.Params:
    """The model with its adapters added to its weights, rounded once to the dtype of these."""
    changed = {}
    for field, adapter in adapters.items():
        w = getattr(params.blocks, field)
        a, b = (np.asarray(sharding.replicate(x)) for x in (adapter.a, adapter.b))
        for i in range(len(a)):
            w = _add(w, _added(a[i], b[i], c), i)
        changed[field] = w
    return dataclasses.replace(params, blocks=dataclasses.replace(params.blocks, **changed))


@jax.jit
def _add(stacked: jax.Array, added: jax.Array, i: Int[jax.Array, ""]) -> jax.Array:
    """The weight of all layers with something added to one of them."""
    layout = jax.typeof(stacked).sharding.spec
    layer = stacked.at[i].get(out_sharding=jax.P(*layout[1:])).astype(jnp.float32)
    layer += jax.sharding.reshard(added, jax.P(*layout[1:]))
    return stacked.at[i].set(layer.astype(stacked.dtype))


class Merged:
    """The tensors of a model with adapters added, float32 where there is one.

    Args:
      adapters: on the host.
    """

    def __init__(self, base: Source, model: decoder.Params, adapters: Mapping[str, Adapter], c: LoraConfig):
        self._base, self._parts, self._adapters, self._c = base, parts(model), adapters, c
        self._fields = [field.name for field in dataclasses.fields(model.blocks)]  # the first leaves of a model

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of every tensor, without reading the data."""
        return self._base.shapes()

    def __getitem__(self, name: str) -> np.ndarray:
        values = self._base[name]
        for part in self._parts.get(name, ()):
            if part.layer is not None and (adapter := self._adapters.get(self._fields[part.leaf])) is not None:
                values = values.astype(np.float32)
                added = _added(adapter.a[part.layer], adapter.b[part.layer], self._c)
                w = part.weight
                values[part.start : part.stop] += rearrange(added, f"{w.layer_dims} -> {w.hf_dims}")
        return values

    def rows(self, name: str, start: int, stop: int) -> np.ndarray:
        """A part of a tensor, by its first dimension."""
        if any(part.layer is not None for part in self._parts.get(name, ())):
            return self[name][start:stop]
        return self._base.rows(name, start, stop)


# --- PEFT ------------------------------------------------------------------------------------------------------------


def save(folder: Path, tensors: Source, adapters: Mapping[str, Adapter], c: LoraConfig, model: str) -> None:
    """Writes adapters as PEFT does.

    Args:
      tensors: of the adapters.
      adapters: declared.
      model: where PEFT is to look for the model they belong to.

    Raises:
      UserError: the family keeps several of the adapted weights in one tensor, for which PEFT has one adapter.
    """
    found = _tensors(adapters, "export the merged model")
    folder.mkdir(parents=True, exist_ok=True)
    safetensors.numpy.save_file({name: tensors[name] for name in found}, folder / _WEIGHTS, metadata={"format": "pt"})
    modules = sorted({name.removeprefix(PEFT).split(".")[-3] for name in found})
    values = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": model,
        "r": c.rank,
        "lora_alpha": c.alpha,
        "lora_dropout": c.dropout,
        "target_modules": modules,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
    }
    (folder / _CONFIG).write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _tensors(adapters: Mapping[str, Adapter], remedy: str) -> dict[str, list[Part]]:
    """What each of PEFT's tensors holds.

    Raises:
      UserError: the family keeps several of the adapted weights in one tensor, for which PEFT has one adapter.
    """
    found = parts(adapters)
    if shared := [name for name, held in found.items() if len(held) > 1]:
        raise UserError(
            f"PEFT has one adapter where this family keeps several weights in one tensor, as in {shared[0]}; {remedy}"
        )
    return found


def opened(folder: Path) -> Tensors:
    """The tensors of adapters in PEFT's format."""
    return Tensors(folder, _WEIGHTS)


def load(folder: Path, model: decoder.Params, c: LoraConfig, dtype: Any = np.float32) -> Adapters:
    """Adapters in PEFT's format, in storage layout on the current mesh.

    Raises:
      UserError: they are none, are of another kind, or do not fit the configuration or the model; or the family keeps
        several of the adapted weights in one tensor.
    """
    path = folder / _CONFIG
    if not path.is_file():
        raise UserError(f"{path} not found; expected a folder in PEFT's format")
    values = read_json(path)
    expected = {"peft_type": "LORA", "r": c.rank, "lora_alpha": c.alpha, "bias": "none"}
    unset = dict.fromkeys(
        ("use_rslora", "use_dora", "rank_pattern", "alpha_pattern", "modules_to_save", "layers_to_transform")
    )
    problems = [
        f"{key} is {values.get(key)!r}, expected {want!r}" for key, want in expected.items() if values.get(key) != want
    ]
    problems += [f"{key} is {values[key]!r}, which is not implemented" for key in unset if values.get(key)]
    if problems:
        raise UserError(f"{path}: {'; '.join(problems)} (lora.rank and lora.alpha have to be those of the adapters)")
    declared = template(c, model)
    _tensors(declared, "merge those adapters into the model with PEFT, and start from that one")
    with opened(folder) as tensors:
        check(declared, tensors.shapes(), str(folder))
        return hf.load_tensors(tensors, declared, dtype)


def on_host(declared: Mapping[str, Adapter], read: Any) -> dict[str, Adapter]:
    """Adapters as host arrays.

    Args:
      read: gives the array of a leaf of the declared ones.
    """
    leaves, tree = jax.tree.flatten(dict(declared), is_leaf=weights.is_declared)
    return jax.tree.unflatten(tree, [np.asarray(read(i, ...)) for i in range(len(leaves))])
