"""Low-rank adapters (LoRA, arXiv 2106.09685): which weights have one, and how a projection adds it."""

import dataclasses
import fnmatch
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, PRNGKeyArray

from jaxdistill.errors import UserError
from jaxdistill.models import decoder
from jaxdistill.models.layers import Projection, matmul
from jaxdistill.sharding import spec
from jaxdistill.weights import Declared, Initializer, Weight

PEFT = "base_model.model."  # what PEFT puts before the names of the model it adapts


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """Low-rank adapters, which are trained in place of the weights they belong to."""

    rank: int = 0  # 0: all weights are trained, and there are no adapters
    alpha: float = 16.0  # what an adapter adds is multiplied by alpha / rank
    dropout: float = 0.0  # share of an adapter's inputs that training leaves out
    weights: tuple[str, ...] = ("*_proj",)  # modules by Hugging Face's names, with wildcards, the layer's number as {}
    start: Path | None = None  # adapters in PEFT's format to start from, of the same rank, alpha and weights

    def __post_init__(self):
        if self.rank < 0:
            raise UserError(f"lora.rank is {self.rank}; expected 0 (no adapters) or more")
        if self.alpha <= 0:
            raise UserError(f"lora.alpha is {self.alpha}; expected a positive number")
        if not 0 <= self.dropout < 1:
            raise UserError(f"lora.dropout is {self.dropout}; expected 0 to less than 1")

    @property
    def scale(self) -> float:
        """What the product of an adapter's two matrices is multiplied by."""
        return self.alpha / self.rank


@struct.dataclass
class Adapter:
    """What is added to a weight [in, out]: a [in, r] times b [r, out], of all layers."""

    a: Weight
    b: Weight


Adapters = Mapping[str, Adapter]  # by field of the family's Block


def template(c: LoraConfig, model: decoder.Params) -> dict[str, Adapter]:
    """The adapters of a model, declared: a random, b zero, so that they add nothing at first.

    Raises:
      UserError: a pattern is the name of no matrix, or of experts.
    """
    blocks = {field.name: getattr(model.blocks, field.name) for field in dataclasses.fields(model.blocks)}
    matrices = {field: w for field, w in blocks.items() if w.init.stddev > 0}
    modules = {field: w.hf_name.removesuffix(".weight") for field, w in matrices.items()}
    if unknown := [pattern for pattern in c.weights if not fnmatch.filter(modules.values(), pattern)]:
        raise UserError(
            f"lora.weights: {', '.join(unknown)} names no matrix; they are {', '.join(sorted(set(modules.values())))}"
        )
    chosen = [field for field, name in modules.items() if any(fnmatch.fnmatch(name, p) for p in c.weights)]
    if of_experts := [modules[field] for field in chosen if matrices[field].per_expert]:
        raise UserError(
            f"lora.weights {' '.join(c.weights)} names {', '.join(of_experts)}; adapters of experts are not "
            "implemented: set it to *self_attn.*_proj"
        )
    return {field: _adapter(matrices[field], c.rank) for field in chosen}


def _adapter(w: Declared, rank: int) -> Adapter:
    sizes = dict(zip(w.dims, w.shape, strict=True)) | {"r": rank}
    out, into = re.findall(r"\([^)]*\)|\w", w.hf_dims)  # Hugging Face's matrices are [out, in]
    name = PEFT + w.hf_name.removesuffix(".weight")
    width = 1
    for letter in re.findall(r"\w", into):
        width *= sizes[letter]

    def declared(dims: str, hf: str, layout: str, stddev: float) -> Declared:
        dims = "L" + "".join(re.findall(r"\w", dims))
        return Declared(dims, tuple(sizes[d] for d in dims), Initializer(0.0, stddev), f"{name}.{hf}.weight", layout)

    # The variance of PEFT's start, which is uniform
    return Adapter(
        a=declared(f"{into}r", "lora_A", f"r {into}", (3 * width) ** -0.5),
        b=declared(f"r{out}", "lora_B", f"{out} r", 0.0),
    )


@struct.dataclass
class Adapted:
    """A weight with its adapter, which stand in a Block where the weight stood."""

    w: Any
    a: Any
    b: Any
    key: Any  # data of the random keys of dropout, one a layer; None: nothing is left out
    scale: float = struct.field(pytree_node=False)
    dropout: float = struct.field(pytree_node=False)


def apply(params: decoder.Params, adapters: Adapters, c: LoraConfig, key: PRNGKeyArray | None = None) -> decoder.Params:
    """The model with adapters beside its weights.

    Args:
      key: of dropout; without one nothing is left out.
    """
    changed = {}
    for i, (field, adapter) in enumerate(sorted(adapters.items())):
        w, keys = getattr(params.blocks, field), None
        if key is not None and c.dropout:
            keys = jax.random.key_data(jax.random.split(jax.random.fold_in(key, i), w.shape[0]))
        changed[field] = Adapted(w, adapter.a, adapter.b, keys, c.scale, c.dropout)
    return dataclasses.replace(params, blocks=dataclasses.replace(params.blocks, **changed))


def adapting(project: Projection) -> Projection:
    """A projection that adds the adapter of a weight that has one; others are as they were."""

    def run(equation: str, x: Array, w: Any) -> Array:
        if not isinstance(w, Adapted):
            return project(equation, x, w)
        x_dims, w_dims, out_dims = equation.replace("->", ",").split(",")
        into = "".join(d for d in w_dims if d not in out_dims)
        out = "".join(d for d in w_dims if d in out_dims)
        narrow = "".join(d for d in x_dims if d not in into) + "r"
        low = matmul(f"{x_dims},{into}r->{narrow}", _dropped(x, x_dims, w), w.a)
        return project(equation, x, w.w) + w.scale * matmul(f"{narrow},r{out}->{out_dims}", low, w.b)

    return run


def _dropped(x: Array, dims: str, w: Adapted) -> Array:
    if w.key is None:
        return x
    drawn = jax.random.uniform(jax.random.wrap_key_data(w.key), x.shape, jnp.float32, out_sharding=spec(dims))
    return jnp.where(drawn < w.dropout, 0.0, x / (1 - w.dropout)).astype(x.dtype)
