"""Tensors by Hugging Face name, one at a time: those of a folder's files, and those that stacked weights make up."""

import contextlib
import json
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import numpy as np
import safetensors
from einops import rearrange

from jaxdistill import weights
from jaxdistill.errors import UserError
from jaxdistill.models import decoder

INDEX = "model.safetensors.index.json"


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
      UserError: it holds something else.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise UserError(f"{path} is not valid JSON ({error}); download it again") from None
    if not isinstance(values, dict):
        raise UserError(f"{path} holds a JSON {type(values).__name__}, expected an object")
    return values


@runtime_checkable
class Source(Protocol):
    """Tensors that are read when they are asked for."""

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of every tensor, without reading the data."""
        ...

    def __getitem__(self, name: str) -> np.ndarray: ...

    def rows(self, name: str, start: int, stop: int) -> np.ndarray:
        """A part of a tensor, by its first dimension."""
        ...


class Tensors(contextlib.AbstractContextManager):
    """The tensors of a folder, whether in one safetensors file or in several with an index."""

    def __init__(self, folder: Path, name: str = "model.safetensors"):
        self._open = contextlib.ExitStack()
        index, single = folder / INDEX, folder / name
        if index.is_file():
            file_of = read_json(index).get("weight_map", {})
        elif single.is_file():
            with _safe_open(single) as file:
                file_of = dict.fromkeys(file.keys(), single.name)
        else:
            raise UserError(f"{folder} holds neither {name} nor {INDEX}; expected Hugging Face weights")
        lost = sorted(name for name in set(file_of.values()) if not (folder / name).is_file())
        if lost:
            raise UserError(f"{folder}: {INDEX} names files that are not there: {', '.join(lost)}")
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

    def rows(self, name: str, start: int, stop: int) -> np.ndarray:
        """A part of a tensor, by its first dimension."""
        return self._file[name].get_slice(name)[start:stop]


def _safe_open(path: Path) -> Any:
    try:
        return safetensors.safe_open(path, framework="numpy", backend="pread")  # mapped files count as memory
    except safetensors.SafetensorError as error:
        raise UserError(f"{path} is not a readable safetensors file ({error}); download it again") from None


class Part(NamedTuple):
    """What one weight contributes to a tensor: rows that begin at `start`, of one layer where layers are stacked.

    And of one expert, where those are stacked too.
    """

    weight: weights.Declared
    leaf: int  # the weight's place among the leaves of the template
    layer: int | None
    expert: int | None
    start: int

    @property
    def stop(self) -> int:
        """One past its last row."""
        return self.start + self.weight.hf_shape[0]


def parts(template: Any) -> dict[str, list[Part]]:
    """The tensors that hold these weights; weights that name the same one lie there one after another."""
    found: dict[str, list[Part]] = {}
    ends: Counter[str] = Counter()
    for leaf, w in enumerate(jax.tree.leaves(template, is_leaf=weights.is_declared)):
        start = ends[w.hf_name]
        ends[w.hf_name] += w.hf_shape[0]
        for layer in range(w.shape[0]) if w.dims.startswith("L") else [None]:
            for expert in range(w.shape[1]) if w.per_expert else [None]:
                name = w.hf_name.format(layer, expert)
                found.setdefault(name, []).append(Part(w, leaf, layer, expert, start))
    return found


Piece = tuple[str, list[Part], Part]  # a tensor's name, all that lies in it, and what of it is meant


def homes(template: Any) -> dict[tuple[int, int | None], list[Piece]]:
    """Where each layer of each weight lies, by leaf and layer: in one tensor, or in one an expert."""
    found: dict[tuple[int, int | None], list[Piece]] = {}
    for name, held in parts(template).items():
        for part in held:
            found.setdefault((part.leaf, part.layer), []).append((name, held, part))
    return found


def read_layer(tensors: Source, pieces: list[Piece]) -> np.ndarray:
    """One layer of a weight, in our layout."""
    read = [_read_part(tensors, *piece) for piece in pieces]
    return read[0] if pieces[0][2].expert is None else np.stack(read)


def _read_part(tensors: Source, name: str, held: list[Part], part: Part) -> np.ndarray:
    values = tensors[name] if len(held) == 1 else tensors.rows(name, part.start, part.stop)
    w = part.weight
    sizes = dict(zip(w.dims, w.shape, strict=True))
    axes = {letter: sizes[letter] for letter in w.tensor_dims.split()}
    return rearrange(values, f"{w.hf_dims} -> {w.tensor_dims}", **axes)


class Stacked:
    """The tensors that stacked weights make up.

    Args:
      read: gives of the weight with this place among the leaves what an index asks for: a layer, some rows, or `...`.
    """

    def __init__(self, template: Any, read: Callable[[int, Any], np.ndarray]):
        self._parts, self._read = parts(template), read
        self._experts: tuple[tuple[int, int | None], np.ndarray] | None = None  # the weight and layer read last

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of every tensor, without reading the data."""
        return {name: (held[-1].stop, *held[0].weight.hf_shape[1:]) for name, held in self._parts.items()}

    def __getitem__(self, name: str) -> np.ndarray:
        pieces = [
            rearrange(self._tensor(p), f"{p.weight.tensor_dims} -> {p.weight.hf_dims}") for p in self._parts[name]
        ]
        return np.ascontiguousarray(pieces[0] if len(pieces) == 1 else np.concatenate(pieces))

    def _tensor(self, p: Part) -> np.ndarray:
        if p.expert is None:
            return self._read(p.leaf, ... if p.layer is None else p.layer)
        place = (p.leaf, p.layer)  # experts are asked for one after the other, and read together
        if self._experts is None or self._experts[0] != place:
            self._experts = place, self._read(p.leaf, p.layer)
        return self._experts[1][p.expert]

    def rows(self, name: str, start: int, stop: int) -> np.ndarray:
        """A part of a tensor, by its first dimension."""
        (part, *others) = self._parts[name]
        if others or part.layer is not None:
            return self[name][start:stop]
        return self._read(part.leaf, slice(start, stop))  # those that belong to no layer are laid out as there


def check(template: Any, found: Mapping[str, tuple[int, ...]], where: str) -> None:
    """Compares the tensors that hold these weights with those a folder has.

    Raises:
      UserError: tensors are missing, extra or misshapen; every one of them is named.
    """
    needed = Stacked(template, _unread).shapes()
    tied = isinstance(template, decoder.Params) and template.unembed is None
    passed_over = {"lm_head.weight"} if tied else set()  # some exporters write the shared matrix twice
    problems = [f"missing {name} {list(needed[name])}" for name in sorted(needed.keys() - found.keys())]
    extra = {name for name in found.keys() - needed.keys() - passed_over if not name.endswith(_DERIVED)}
    problems += [f"unexpected {name} {list(found[name])}" for name in sorted(extra)]
    problems += [
        f"{name} is {list(found[name])}, expected {list(needed[name])}"
        for name in sorted(needed.keys() & found.keys())
        if found[name] != needed[name]
    ]
    if problems:
        raise UserError(f"{where}: the tensors do not fit config.json:\n  " + "\n  ".join(problems))


_DERIVED = ".rotary_emb.inv_freq"  # old Llama exports hold what config.json says already; transformers skips it too


def _unread(leaf: int, index: Any) -> np.ndarray:
    raise AssertionError(f"weight {leaf} {index} has a shape alone")


def differing(found: Source, expected: Source, template: decoder.Params, dtype: Any) -> list[str]:
    """Names of the tensors that are not, bit for bit, the expected ones rounded once to a dtype."""
    bits = f"u{np.dtype(dtype).itemsize}"
    shapes = found.shapes()

    def same(name: str) -> bool:
        if name not in shapes:
            return False
        ours, theirs = found[name], expected[name].astype(dtype, copy=False)
        return ours.dtype == theirs.dtype and np.array_equal(ours.view(bits), theirs.view(bits))

    return [name for name in parts(template) if not same(name)]
