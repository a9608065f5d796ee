"""The training step compiled for hardware that is not here, and what its compiler says of memory and communication."""

import dataclasses
import math
import os
import re
import time
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import topologies

from jaxdistill import optim, sharding
from jaxdistill.data import packing
from jaxdistill.data.packing import Batch
from jaxdistill.errors import UserError
from jaxdistill.models.config import Config
from jaxdistill.plan import collectives, cuda
from jaxdistill.plan.collectives import Collective
from jaxdistill.plan.hardware import Hardware
from jaxdistill.train.config import TrainConfig, check_fits
from jaxdistill.train.step import State, abstract_state, make_step
from jaxdistill.train.trained import Trained

_TOO_LARGE = re.compile(r"Used ([\d.]+)([KMGT]) of [\d.]+[KMGT] hbm")


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes on one device; what falls to each kind, and the most that are held at once."""

    weights: int  # those that are trained
    frozen: int  # weights that stay, where adapters are trained
    optimizer: int  # moments, and the average of the weights
    saved: int  # by the forward pass for the backward pass, of all layers
    temporaries: int  # all else that exists while the step runs: gradients, gathered weights, workspace
    host: int  # of the host's memory

    @property
    def total(self) -> int:
        """On the device."""
        return self.weights + self.frozen + self.optimizer + self.saved + self.temporaries


@dataclasses.dataclass(frozen=True)
class Compiled:
    """What the compiler made of a step."""

    memory: Memory
    collectives: list[Collective]
    compile_s: float


class DoesNotFitError(Exception):
    """The compiler found no way to hold the step in a device's memory."""

    def __init__(self, needed: float | None):
        needs = f"{needed / 2**30:.1f} GiB a device" if needed else "more memory than a device has"
        super().__init__(f"needs {needs}")


def devices(hardware: Hardware) -> Sequence[Any]:
    """Stand-ins for the hardware's devices: a mesh of them can be compiled for, not run on.

    Raises:
      UserError: its compiler is not installed, or knows no such shape.
    """
    jax.config.update("jax_platforms", "cpu")  # what is here does not matter, and must not be taken from others
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # no metadata server is asked what TPU this is
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # no TPU is used, so two planners may compile at a time
    platform = hardware.chip.platform
    extra, of_platform = {"tpu": ("tpu", _tpus), "cuda": ("cuda13", cuda.devices)}[platform]
    try:
        return of_platform(hardware)
    except (RuntimeError, ValueError) as error:
        raise UserError(
            f"{hardware}: this installation cannot compile for it ({str(error).splitlines()[0]}); "
            f"pip install 'jaxdistill[{extra}]' brings the compiler, no device is needed"
        ) from None


def _tpus(hardware: Hardware) -> Sequence[Any]:
    name = f"{hardware.chip.topology}:{'x'.join(map(str, hardware.shape))}"
    return topologies.get_topology_desc(platform="tpu", topology_name=name).devices


def compile_step(config: TrainConfig, c: Config, mesh: jax.sharding.Mesh, documents: int | None = None) -> Compiled:
    """Compiles the step of a run's first phase, the very one that training runs, for the devices of a mesh.

    Args:
      documents: of a row at most, its padding counted as one.

    Raises:
      UserError: the mesh does not split the rows or the model evenly, or attention has no backend there.
      DoesNotFitError: the compiler ran out of a device's memory.
    """
    device = mesh.devices.flat[0]
    attention = check_fits(config, c, dict(mesh.shape), device)
    if documents:
        attention = dataclasses.replace(attention, segments=documents)
    with jax.set_mesh(mesh):
        trained, phase = Trained(config, c), config.phases[0].optim
        optimizer = optim.make(phase, config.phases[0].steps or 1000, trained.template)
        dtype, average = jnp.dtype(phase.state_dtype), phase.average_decay > 0
        on_host, bad = config.step.offload_moments, config.bad_steps
        state = abstract_state(trained.template, optimizer, dtype, average, on_host, bad.spike is not None)
        step: Any = make_step(config.step, attention, c, optimizer, phase.average_decay, trained.lora, bad)
        if device.platform == "gpu" and on_host:
            step = cuda.with_moments_on_host(step)
        frozen = trained.abstract_frozen()
        traced = step.trace(state, _batch(config), *frozen)
        compiled, seconds = compile_for(traced, mesh)
        saved = saved_bytes(traced.jaxpr.jaxpr, c.layers)
        return Compiled(
            memory=_memory(state, frozen, compiled.memory_analysis(), saved, on_host),
            collectives=collectives.read(compiled.as_text()),
            compile_s=seconds,
        )


def compile_for(traced: Any, mesh: jax.sharding.Mesh) -> tuple[Any, float]:
    """A traced program compiled for the devices of a mesh, and the seconds that took.

    Raises:
      DoesNotFitError: the compiler ran out of a device's memory.
    """
    platform, started = mesh.devices.flat[0].platform, time.perf_counter()
    try:
        compiled = traced.lower(lowering_platforms=("cuda" if platform == "gpu" else platform,)).compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise DoesNotFitError(_needed(str(error))) from None
    return compiled, time.perf_counter() - started


def _batch(config: TrainConfig) -> Batch:
    """The shapes of a step's rows [accumulate, B, T] on the current mesh."""
    pieces = config.step.accumulate
    shape = pieces, config.batch_rows // pieces, config.row_tokens
    layout = jax.sharding.NamedSharding(jax.sharding.get_mesh(), sharding.spec("ABT"))
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(shape, x.dtype, sharding=layout), packing.empty_row(1))


def _needed(message: str) -> float | None:
    found = _TOO_LARGE.search(message)
    return float(found[1]) * 2.0 ** (10 * ("KMGT".index(found[2]) + 1)) if found else None


def _memory(state: State, frozen: Any, analysis: Any, saved: tuple[int, int], moments_on_host: bool) -> Memory:
    def held(tree: Any) -> int:
        return sum(device_bytes(x, x.sharding.spec) for x in jax.tree.leaves(tree))

    total = total_bytes(analysis)
    on_device, on_host = saved
    of_weights, of_frozen = held(state.params), held(frozen)
    of_optimizer = held((None if moments_on_host else state.opt_state, state.average))
    return Memory(
        weights=of_weights,
        frozen=of_frozen,
        optimizer=of_optimizer,
        saved=on_device,
        temporaries=total - of_weights - of_frozen - of_optimizer - on_device,
        host=max(on_host, analysis.host_temp_size_in_bytes) + analysis.host_argument_size_in_bytes,
    )


def total_bytes(analysis: Any) -> int:
    """What a program compiled for the current mesh needs of one device's memory."""
    if jax.sharding.get_mesh().devices.flat[0].platform == "tpu":
        # What TPUs' compiler holds against the memory when it refuses a program; the sum below, where buffers that are
        # not there at the same time count together, may exceed what it accepts
        return analysis.peak_memory_in_bytes
    total = analysis.argument_size_in_bytes + analysis.temp_size_in_bytes
    return total + analysis.output_size_in_bytes - analysis.alias_size_in_bytes


def device_bytes(x: Any, spec: jax.P) -> int:
    """Bytes that an array of this layout takes on one device of the current mesh."""
    mesh = jax.sharding.get_abstract_mesh()
    itemsize = 8 if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key) else jnp.dtype(x.dtype).itemsize
    return math.prod(x.shape) * itemsize // math.prod(mesh.shape[axis] for axis in sharding.split_over(spec))


def saved_bytes(jaxpr: Any, layers: int) -> tuple[int, int]:
    """What the forward pass over the layers stacks up for the backward pass: bytes on a device and on its host."""
    scans = (e for e in equations(jaxpr) if e.primitive.name == "scan" and e.params["length"] == layers)
    stacked = next(filter(None, map(_stacked, scans)))  # accumulation in as many pieces is a scan too, but stacks none
    held = {False: 0, True: 0}
    for aval in stacked:
        held[aval.memory_space == jax.memory.Space.Host] += device_bytes(aval, aval.sharding.spec)
    return held[False], held[True]


def _stacked(scan: Any) -> list[Any]:
    """What a scan puts out for each of its rounds; how its carry is told from that differs between versions of jax."""
    body = getattr(scan.params["jaxpr"], "jaxpr", scan.params["jaxpr"])
    pairs = ((outer.aval, inner.aval) for outer, inner in zip(scan.outvars, body.outvars, strict=True))
    return [outer for outer, inner in pairs if outer.ndim > inner.ndim]


def equations(jaxpr: Any) -> Iterator[Any]:
    """All operations of a program, in order, outer ones before those within."""
    for equation in jaxpr.eqns:
        yield equation
        for inner in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns")):
            inner = getattr(inner, "jaxpr", inner)
            if hasattr(inner, "eqns"):
                yield from equations(inner)
