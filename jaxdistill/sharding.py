"""The mesh, and the tables that say which tensor dimension lives on which mesh axis. Legend: docs/shapes.md."""

import contextlib
import contextvars
import dataclasses
import functools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType

from jaxdistill.errors import RunError, UserError

MESH_AXES = ("data", "fsdp", "context", "tensor")
_LANES = 128  # elements in a row of a TPU's vector registers
HOST_MEMORY = "pinned_host"  # jax's name for memory of the host that devices read and write by themselves
MeshAxes = str | tuple[str, ...] | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """Devices per mesh axis; together they use every device of the job."""

    data: int | None = None  # replicas of the weights, the batch is split; by default what the other axes leave
    fsdp: int = 1  # weights and batch are split (ZeRO-3)
    context: int = 1  # the positions of a row are split, and the weights further
    tensor: int = 1  # heads, mlp (or whole experts) and vocabulary are split (Megatron)

    def __post_init__(self):
        for axis in MESH_AXES:
            size = getattr(self, axis)
            if size is not None and size < 1:
                raise UserError(f"mesh.{axis} is {size}; expected 1 or more")

    def sizes(self, devices: Sequence[Any] | None = None) -> dict[str, int]:
        """Devices by axis name, in mesh order.

        Args:
          devices: of jax; all of the job by default.

        Raises:
          UserError: the sizes do not multiply to the number of devices.
        """
        devices = jax.devices() if devices is None else devices
        have, others = len(devices), self.fsdp * self.context * self.tensor
        data = max(1, have // others) if self.data is None else self.data
        sizes = {"data": data, "fsdp": self.fsdp, "context": self.context, "tensor": self.tensor}
        if data * others != have:
            shape = " x ".join(f"{axis} {size}" for axis, size in sizes.items())
            raise UserError(
                f"the mesh {shape} needs {data * others} devices, found {have} ({devices[0].device_kind}); "
                f"set mesh.data, mesh.fsdp, mesh.context and mesh.tensor so that their product is {have}"
            )
        return sizes

    def build(self, devices: Sequence[Any] | None = None) -> jax.sharding.Mesh:
        """Makes the mesh, with explicit axis types, over all devices of the job or those given. Raises as `sizes`."""
        devices = jax.devices() if devices is None else devices
        shape = tuple(self.sizes(devices).values())
        # jax.make_mesh refuses an axis that takes a part of a dimension of a TPU's torus, as fsdp 64 x tensor 4 does
        placed = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
        return jax.sharding.Mesh(placed, MESH_AXES, axis_types=(AxisType.Explicit,) * len(MESH_AXES))


# A letter that is absent from a table is replicated.
STORAGE: Mapping[str, MeshAxes] = {
    "V": "tensor",
    "E": "tensor",
    "D": ("fsdp", "context"),
    "F": "tensor",
    "N": "tensor",
    "K": "tensor",
}
COMPUTE: Mapping[str, MeshAxes] = {
    "B": ("data", "fsdp"),
    "P": ("data", "fsdp"),
    "T": "context",
    "p": "context",
    "E": "tensor",
    "F": "tensor",
    "N": "tensor",
    "K": "tensor",
    "V": "tensor",
}
# Every device along these axes sees other tokens, so a weight's gradient is summed over them.
TOKEN_AXES = frozenset({"data", "fsdp", "context"})


_rows_are_whole = contextvars.ContextVar("_rows_are_whole", default=False)


@contextlib.contextmanager
def whole_rows() -> Iterator[None]:
    """Within it every device along context computes whole rows, with weights that are not split along it.

    That is for sampling, where a row is a token or a few, and a step would gather weights for each. It holds while a
    program is traced.
    """
    token = _rows_are_whole.set(True)
    try:
        yield
    finally:
        _rows_are_whole.reset(token)


def spec(dims: str, table: Mapping[str, MeshAxes] = COMPUTE) -> jax.P:
    """The partition of a tensor whose dimensions are the letters `dims`."""
    if _rows_are_whole.get():
        table = {**table, "T": None, "D": "fsdp" if table is STORAGE else None}
    return jax.P(*(table.get(letter) for letter in dims))


def einsum(equation: str, *operands: jax.Array, **kwargs: Any) -> jax.Array:
    """`jnp.einsum` whose result is laid out by the letters after the arrow."""
    return jnp.einsum(equation, *operands, out_sharding=spec(equation.split("->")[1]), **kwargs)


def relayout(x: jax.Array, dims: str) -> jax.Array:
    """Moves an activation to the layout of `dims`: this is where communication shows."""
    return jax.sharding.reshard(x, spec(dims))


def gather(weight: jax.Array, dims: str, dtype: Any) -> jax.Array:
    """A stored weight in compute layout: cast first, so that half the bytes travel, then gathered.

    First a device's part over context, then the larger parts over fsdp: those are what TPUs want to be wide
    (`reduced_whole`). The results are marked `reduced`, which makes the gradient arrive as per-device partial sums. On
    its way back it is reduce-scattered over fsdp, what is left of it over context, and only then, in storage layout,
    all-reduced over data.

    The gathers are written out for the sake of the gradient: what is left to the partitioner becomes an all-reduce of
    which a part is kept. They stack the devices' parts in front, and do not join them along D: a TPU tiles the last two
    dimensions of its layout, and where parts are no whole tiles it reduce-scatters by a whole all-reduce.
    """
    axes = split_over(spec("D", STORAGE))
    if "D" not in dims:  # computed where it is stored
        return jax.sharding.reshard(weight.astype(dtype), jax.P(*spec(dims), reduced=TOKEN_AXES))
    stored = jax.P(*spec(dims, STORAGE), reduced=TOKEN_AXES.difference(axes))
    gathered = jax.P(*spec(dims), reduced=TOKEN_AXES)
    weight = jax.sharding.reshard(weight.astype(dtype), stored)
    sizes = jax.sharding.get_abstract_mesh().shape
    if all(sizes[axis] == 1 for axis in axes):  # nothing travels; jax 0.10 fails to lower a shard_map over one device
        return jax.sharding.reshard(weight, gathered)

    def local(w: jax.Array) -> jax.Array:
        w = jnp.moveaxis(w, dims.index("D"), 0)
        for axis in reversed(axes):
            w = jax.lax.all_gather(w, axis, to="reduced")
        return jnp.moveaxis(w.reshape(-1, *w.shape[len(axes) + 1 :]), 0, dims.index("D"))

    moved: Any = jax.shard_map(local, in_specs=stored, out_specs=gathered)(weight)
    return moved


def split_over(layout: jax.P) -> tuple[str, ...]:
    """The mesh axes that an array of this layout is split over."""
    return tuple(axis for entry in layout if entry for axis in ((entry,) if isinstance(entry, str) else entry))


def replicate(x: jax.Array) -> jax.Array:
    """The same value on every device."""
    return jax.sharding.reshard(x, jax.P())


def check_divisible(sizes: Mapping[str, int], mesh: Mapping[str, int]) -> None:
    """Refuses a mesh that would split a dimension of a weight unevenly, naming every such dimension at once.

    Raises:
      UserError: a size is not a multiple of the devices it is split over.
    """
    problems = []
    for letter, size in sizes.items():
        axes = split_over(spec(letter, STORAGE))
        if size % (parts := math.prod(mesh[axis] for axis in axes)):
            problems.append(f"{letter} = {size} is not a multiple of {parts} ({' x '.join(axes)})")
    if problems:
        raise UserError(f"the mesh {dict(mesh)} does not fit: {'; '.join(problems)} (letters: docs/shapes.md)")


def reduced_whole(sizes: Mapping[str, int], mesh: Mapping[str, int], generation: str) -> str | None:
    """What to know before TPUs run: which meshes make their compiler add gradients up whole, and keep a part of each.

    Seen in programs compiled for them. Parts of D below a vector register's 128 lanes are padded to the
    whole weight and added up, twice the bytes of a gather. Parts over context may be narrow: they are put together
    first, and hold a device's share over fsdp alone. And a group of all devices does not reduce-scatter at all, but on
    tpu7x.

    Args:
      generation: the chip's name, as v5e.
    """
    part = sizes["D"] // mesh["fsdp"]
    if mesh["fsdp"] > 1 and part < _LANES:
        wide = max(1, sizes["D"] // _LANES)
        return (
            f"mesh.fsdp {mesh['fsdp']} leaves {part} of D = {sizes['D']} on a device; TPUs gather weights in parts "
            f"below {_LANES} by all-reduce, at twice the bytes. With mesh.fsdp {wide} or less, and the devices it "
            "frees in mesh.data, mesh.context or mesh.tensor, they would not"
        )
    for axis, other in (("fsdp", "context"), ("context", "fsdp")):
        if mesh[axis] == math.prod(mesh.values()) > 1 and not scatters_over_all(generation):
            return (
                f"mesh.{axis} {mesh[axis]} is all devices, and TPUs add gradients up whole in a group of all, at "
                f"twice the bytes of a reduce-scatter. With a part of them in mesh.{other}, which splits the weights "
                "as well, they would not"
            )
    return None


def scatters_over_all(generation: str) -> bool:
    """Whether the compiler of a generation of TPUs reduce-scatters in a group of all devices."""
    return generation == "tpu7x"


def row_order(length: int, shards: int) -> np.ndarray:
    """Which position of a row stands at each place when the row is split over `shards` devices [length].

    A row is cut into 2 x shards chunks, and shard i holds the i-th and the i-th last ("zigzag"): the later a query, the
    more keys it sees, so with one chunk each the last device would work almost twice the average.
    """
    if shards == 1:
        return np.arange(length)
    chunks = np.arange(length).reshape(2 * shards, -1)
    pairs = np.stack([np.arange(shards), np.arange(2 * shards)[::-1][:shards]], axis=1)
    return chunks[pairs.ravel()].ravel()


def put(x: np.ndarray, dims: str, table: Mapping[str, MeshAxes] = COMPUTE) -> jax.Array:
    """A host array on the devices of the current mesh, laid out by its letters: as an activation, or as `table` says.

    Of several processes each hands over the parts of its own devices, wherever on the mesh those are.
    """
    layout = jax.sharding.NamedSharding(jax.sharding.get_mesh(), spec(dims, table))
    return jax.make_array_from_callback(x.shape, layout, lambda index: x[index])


def own_rows(pieces: int, rows: int) -> frozenset[int]:
    """Places in a batch of `pieces` x `rows` rows, piece after piece, that devices of this process hold a part of."""
    layout = jax.sharding.NamedSharding(jax.sharding.get_mesh(), spec("AB"))
    places = np.arange(pieces * rows).reshape(pieces, rows)
    held = layout.addressable_devices_indices_map(places.shape).values()
    return frozenset(int(place) for index in held for place in places[index].flat)


def check_replicas(tree: Any, what: str) -> None:
    """Compares the copies that devices hold of the same part of an array: hosts may have read different files.

    Nothing in jax looks: each host hands over what its own devices hold, and a step with unequal copies runs, wrongly.

    Raises:
      RunError: copies differ; all processes of the job raise it together.
    """
    sizes, named, groups = jax.sharding.get_mesh().shape, [], []
    for path, x in jax.tree.leaves_with_path(tree):
        split = split_over(x.sharding.spec)
        if over := tuple(axis for axis in MESH_AXES if sizes[axis] > 1 and axis not in split):
            named.append((f"{what}{jax.tree_util.keystr(path)}", x))
            groups.append(over)
    if not named:
        return
    agree = jax.device_get(_copies_agree([x for _, x in named], tuple(groups)))
    for (name, _), over, same in zip(named, groups, agree, strict=True):
        if not same:
            raise RunError(
                f"{name}: devices along {' and '.join(over)} should hold the same values and do not; the hosts of this "
                "job read different files (compare them), or one of them is faulty"
            )


@functools.partial(jax.jit, static_argnums=1)
def _copies_agree(arrays: Sequence[jax.Array], groups: Sequence[tuple[str, ...]]) -> list[jax.Array]:
    """Of each array, whether the checksums of its parts are the same along the axes of its group, for all parts."""

    def local(part: jax.Array, over: tuple[str, ...]) -> jax.Array:
        bits = jax.lax.bitcast_convert_type(part, jnp.dtype(f"uint{8 * part.dtype.itemsize}")).astype(jnp.uint32)
        sum_ = jnp.sum(bits.ravel() * (2 * jnp.arange(bits.size, dtype=jnp.uint32) + 1))  # order counts; modulo 2^32
        return jax.lax.pmin(jax.lax.pmax(sum_, over) == jax.lax.pmin(sum_, over), MESH_AXES)

    return [
        jax.shard_map(functools.partial(local, over=over), out_specs=jax.P(), check_vma=False)(x)
        for x, over in zip(arrays, groups, strict=True)
    ]
