"""Weights are declared once, one line each; shapes, layouts, initial values and Hugging Face names are derived here."""

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from jaxdistill import sharding

Weight = Any  # a jax.Array, or what stands in for one: Declared, ShapeDtypeStruct, numbers in 8 bits with their scales
Tree = TypeVar("Tree")


class Initializer(NamedTuple):
    """Initial values: normal with this standard deviation around this mean."""

    mean: float
    stddev: float


normal = Initializer(0.0, 0.02)
ones = Initializer(1.0, 0.0)
zeros = Initializer(0.0, 0.0)


@dataclasses.dataclass(frozen=True)
class Declared:
    """One weight before it exists: its letters, shape, initial values and Hugging Face home."""

    dims: str  # letters of docs/shapes.md; a leading L stacks the layers, LE the experts of each
    shape: tuple[int, ...]
    init: Initializer
    hf_name: str  # "{}" stands for the layer, a second one for the expert
    hf_dims: str  # the layout there, einops style: "(N H) D"

    @property
    def layer_dims(self) -> str:
        """The letters of one layer's weight, spaced as einops wants them."""
        return " ".join(self.dims.removeprefix("L"))

    @property
    def tensor_dims(self) -> str:
        """The same of one tensor in the Hugging Face file: of one expert, where a layer's are stacked."""
        return " ".join(self.dims[self.hf_name.count("{}") :])

    @property
    def per_expert(self) -> bool:
        """Whether each expert has a tensor of its own."""
        return self.hf_name.count("{}") == 2

    @property
    def hf_shape(self) -> tuple[int, ...]:
        """The shape of one tensor in the Hugging Face file."""
        sizes = dict(zip(self.dims, self.shape, strict=True))
        groups = self.hf_dims.replace("(", " ( ").replace(")", " ) ").split()
        shape, inside = [], False
        for word in groups:
            if word in "()":
                inside = word == "("
                if inside:
                    shape.append(1)
            elif inside:
                shape[-1] *= sizes[word]
            else:
                shape.append(sizes[word])
        return tuple(shape)


def weight(dims: str, hf_name: str, hf_dims: str | None = None, init: Initializer = normal) -> Any:
    """Declares a weight as a dataclass field. Without `hf_dims` Hugging Face lays it out as we do."""
    own = " ".join(dims[hf_name.count("{}") :])
    return dataclasses.field(metadata={"dims": dims, "hf_name": hf_name, "hf_dims": hf_dims or own, "init": init})


def template(cls: type[Tree], sizes: Mapping[str, int], **children: Any) -> Tree:
    """An instance of `cls` that holds a `Declared` for every weight; `children` fill the other fields."""
    declared = {
        field.name: Declared(shape=tuple(sizes[d] for d in field.metadata["dims"]), **field.metadata)
        for field in dataclasses.fields(cls)  # type: ignore[arg-type]
        if "dims" in field.metadata and field.name not in children
    }
    return cls(**declared, **children)


def is_declared(x: Any) -> bool:
    """Whether a tree node is a `Declared`; for `is_leaf`."""
    return isinstance(x, Declared)


def abstract(tree: Tree, dtype: Any = jnp.float32) -> Tree:
    """Every weight's shape, dtype and storage layout on the current mesh, without data."""
    mesh = jax.sharding.get_mesh()

    def one(w: Declared) -> jax.ShapeDtypeStruct:
        layout = jax.sharding.NamedSharding(mesh, sharding.spec(w.dims, sharding.STORAGE))
        return jax.ShapeDtypeStruct(w.shape, dtype, sharding=layout)

    return jax.tree.map(one, tree, is_leaf=is_declared)


def on_mesh(tree: Tree) -> Tree:
    """Shapes as `jax.eval_shape` gives them, laid out on the current mesh instead of an abstract one."""
    mesh = jax.sharding.get_mesh()

    def one(x: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        layout = jax.sharding.NamedSharding(mesh, x.sharding.spec if x.sharding else jax.P())  # none: replicated
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=layout)

    return jax.tree.map(one, tree)


def count(tree: Any) -> int:
    """Number of parameters."""
    return sum(int(np.prod(w.shape)) for w in jax.tree.leaves(tree, is_leaf=is_declared))


def init(tree: Tree, seed: int, dtype: Any = jnp.float32, scale: float = 1.0) -> Tree:
    """Random weights in storage layout, drawn on the host: the same values on every mesh.

    Args:
      scale: multiplies the declared standard deviations; 0.02 is small for a narrow model.
    """
    generator = np.random.default_rng(seed)

    def make(w: Declared) -> jax.Array:
        values = (
            generator.normal(w.init.mean, scale * w.init.stddev, w.shape)
            if w.init.stddev
            else np.full(w.shape, w.init.mean)
        )
        return jax.device_put(values.astype(dtype), sharding.spec(w.dims, sharding.STORAGE))

    return jax.tree.map(make, tree, is_leaf=is_declared)
