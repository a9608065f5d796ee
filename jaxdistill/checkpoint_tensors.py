"""The weights of a checkpoint, read and written tensor by tensor: the host holds one, however large the model."""

import asyncio
import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore
from orbax.checkpoint.type_handlers import NumpyHandler

from jaxdistill import checkpoint, checkpoint_damage, checkpoint_store, hf, integrity, lora, weights
from jaxdistill.errors import UserError
from jaxdistill.hf_tensors import Source, Stacked, Tensors, check, homes, read_layer
from jaxdistill.models import decoder
from jaxdistill.models.config import Config


@contextlib.contextmanager
def open_model(model: Path, step: int | None = None) -> Iterator[tuple[Source, Config]]:
    """The tensors of a model by Hugging Face name, and its architecture; arguments and errors as of `load_model`."""
    c, _ = hf.read_config(checkpoint.base_of(model))
    template = decoder.template(c)
    if (located := checkpoint.locate(model, step)) is not None:
        state, found = located
        result = found.get("result", checkpoint_store.RESULT)
        if "lora" not in found:
            yield Stacked(template, _reader(state, result, template)), c
            return
        config = lora.from_json(found["lora"]["config"])
        declared = lora.template(config, template)
        adapters = lora.on_host(declared, _reader(state, result, declared))
        with open_model(checkpoint.adapted(model, found), found["lora"]["step"]) as (base, _):
            yield lora.Merged(base, template, adapters, config), c
        return
    with Tensors(model) as tensors:
        check(template, tensors.shapes(), str(model))
        yield tensors, c


def open_adapters(model: Path, step: int | None) -> tuple[Source, dict[str, lora.Adapter], lora.LoraConfig, Path]:
    """The adapters of a phase: tensors by PEFT's names, declarations, configuration, and the model they belong to.

    Raises:
      UserError: the phase has none.
    """
    c, _ = hf.read_config(checkpoint.base_of(model))
    located = checkpoint.locate(model, step)
    if located is None or "lora" not in located[1]:
        raise UserError(f"{model} has no adapters; expected a phase that was trained with lora.rank")
    state, found = located
    config = lora.from_json(found["lora"]["config"])
    declared = lora.template(config, decoder.template(c))
    tensors = Stacked(declared, _reader(state, found.get("result", checkpoint_store.RESULT), declared))
    return tensors, declared, config, checkpoint.adapted(model, found)


def check_sums(model: Path, step: int | None = None) -> None:
    """Reads the weights of a checkpoint once, the model's under adapters too, and holds them against their sums.

    Raises:
      DamagedError: they are not what was saved, or cannot be read.
    """
    if (located := checkpoint.locate(model, step)) is None:
        return
    state, found = located
    c, _ = hf.read_config(checkpoint.base_of(model))
    template: Any = decoder.template(c)
    if "lora" in found:
        check_sums(checkpoint.adapted(model, found), found["lora"]["step"])
        template = lora.template(lora.from_json(found["lora"]["config"]), template)
    tree = found.get("result", checkpoint_store.RESULT)
    place, saved = state.parent, found.get("sums", {})

    def changed() -> list[str]:
        read = _reader(state, tree, template)
        wrong = []
        for leaf, (path, declared) in enumerate(jax.tree.leaves_with_path(template, is_leaf=weights.is_declared)):
            name = "/".join([tree, *_names(path)])
            if name in saved:  # an imported model has no sums: nothing of it is read for them
                sum_ = integrity.sum_on_host(declared.shape, functools.partial(read, leaf))
                wrong += [name] * (sum_ != saved[name]["sum"])
        return wrong

    checkpoint_damage.refuse(place, checkpoint_damage.attempt(place, changed))


def _names(path: tuple[Any, ...]) -> list[str]:
    return [getattr(key, "name", None) or key.key for key in path]


def _reader(state: Path, tree: str, template: Any) -> Callable[[int, Any], np.ndarray]:
    """Reads the weight with this place among a template's leaves, by an index, from a checkpoint of Orbax.

    What is read of it are whole chunks. Those that `checkpoint_store.save_args` asks for hold one layer; before
    it did, a device's part of all layers was one.
    """
    base = {"driver": "ocdbt", "base": {"driver": "file", "path": f"{state.absolute()}/"}}
    opened = {}
    for leaf, (path, _) in enumerate(jax.tree.leaves_with_path(template, is_leaf=weights.is_declared)):
        place = ".".join([tree, *_names(path)])
        spec = {"driver": "zarr", "kvstore": {**base, "path": f"{place}/"}, "recheck_cached_data": False}
        opened[leaf] = tensorstore.open(spec, read=True, open=True).result()
    return lambda leaf, index: opened[leaf][index].read().result()


def write(phase: Path, tensors: Source, template: decoder.Params, dtype: Any) -> None:
    """Writes tensors as the checkpoint of step 0 of a phase's folder, in our layout, one at a time."""
    declared, tree = jax.tree.flatten(template, is_leaf=weights.is_declared)
    pieces = homes(template)

    def unread(leaf: int) -> _Unread:
        stacked = declared[leaf].dims.startswith("L")

        def read(i: int) -> np.ndarray:
            values = read_layer(tensors, pieces[leaf, i if stacked else None])
            return np.ascontiguousarray(values).astype(dtype, copy=False)

        return _Unread(declared[leaf].shape, np.dtype(dtype), stacked, read)

    params = jax.tree.unflatten(tree, [unread(leaf) for leaf in range(len(declared))])
    state = {checkpoint_store.RESULT: params}
    handlers = ocp.type_handlers.create_type_handler_registry(
        (jax.Array, ocp.type_handlers.ArrayHandler()), (_Unread, _Writer())
    )
    items = {
        "state": ocp.PyTreeCheckpointHandler(type_handler_registry=handlers),
        "input": ocp.JsonCheckpointHandler(),
    }
    with ocp.CheckpointManager(checkpoint.steps_folder(phase), item_handlers=items) as manager:
        saved = ocp.args.PyTreeSave(state, save_args=checkpoint_store.save_args(state))
        facts = ocp.args.JsonSave({"result": checkpoint_store.RESULT})
        manager.save(0, args=ocp.args.Composite(state=saved, input=facts), force=True)


@dataclasses.dataclass(frozen=True)
class _Unread:
    """A weight that is read while it is written; to Orbax it looks like an array."""

    shape: tuple[int, ...]
    dtype: np.dtype
    stacked: bool
    read: Callable[[int], np.ndarray]  # one layer, or with 0 a weight that has none

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def size(self) -> int:
        return int(np.prod(self.shape))

    @property
    def nbytes(self) -> int:
        return self.size * self.dtype.itemsize


class _Writer(NumpyHandler):
    """Orbax's way to write host arrays, but a layer after the other instead of all that there is at once."""

    def __init__(self):
        super().__init__(deepcopy_host_arrays=False)
        self._turn = asyncio.Semaphore(1)

    async def _open_and_write(self, value: _Unread, tspec: dict[str, Any], ts_context: Any) -> None:  # type: ignore[override]
        async with self._turn:
            array = await tensorstore.open(tensorstore.Spec(tspec), create=True, open=True, context=ts_context)
            for i in range(value.shape[0] if value.stacked else 1):
                await array[i if value.stacked else ...].write(value.read(i))
