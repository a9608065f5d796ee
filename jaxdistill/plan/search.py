"""Which mesh, remat policy, row length and optimizer state: all that come out even, ranked by formula."""

import dataclasses
import itertools
import typing
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

import jax.numpy as jnp

from jaxdistill import sharding, weights
from jaxdistill.errors import UserError
from jaxdistill.models import decoder
from jaxdistill.models.config import Config
from jaxdistill.models.remat import Remat
from jaxdistill.plan import roofline
from jaxdistill.plan.hardware import Hardware
from jaxdistill.sharding import MeshConfig
from jaxdistill.train.config import TrainConfig, check_fits
from jaxdistill.train.step import StepConfig
from jaxdistill.train.trained import Trained

USABLE = 0.92  # of a device's memory: the rest goes to the runtime and to fragments
_MAX_TENSOR, _MAX_CONTEXT = 8, 16  # beyond these the wire is all that a step waits for
# Saved by a layer, in widths of the model: for ranking only, the compiler tells the truth
_SAVED_WIDTHS: Mapping[Remat, int] = {
    "full": 1,
    "attention": 2,
    "offload": 0,
    "offload_inputs": 0,
    "matmuls": 9,
    "none": 20,
}
# What the optimizer's state is: in float32, with the moments on the host, or in bfloat16, rounded stochastically
OptimizerState = Literal["float32", "offloaded", "bfloat16"]
_PREFERENCE = 0.02  # of a step's time: what a state that is named later must save to be ranked first


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A way to run the recipe, and what formulas say about it."""

    config: TrainConfig
    sizes: dict[str, int]  # of the mesh
    estimate: roofline.Estimate


def candidates(
    config: TrainConfig,
    c: Config,
    hardware: Hardware,
    device: Any,
    document_tokens: float,
    row_tokens: Sequence[int] = (),
    states: Sequence[OptimizerState] = (),
) -> list[Candidate]:
    """All ways that divide evenly and should fit, fastest first; the recipe's tokens in a step stay what they are.

    Args:
      row_tokens: lengths of rows to try; by default the recipe's.
      states: to try, the preferred first; by default the recipe's.

    Raises:
      UserError: there is none.
    """
    ranked: list[tuple[float, Candidate]] = []
    too_large = 0
    for rank, variant in _variants(config, row_tokens, states):
        for sizes, step in _meshes(variant, c, hardware.devices, device):
            for remat in typing.get_args(Remat):
                steps = dataclasses.replace(step, remat=remat)
                way = dataclasses.replace(variant, mesh=MeshConfig(**sizes), step=steps)
                if _expected_bytes(c, way, sizes) > USABLE * hardware.device_memory:
                    too_large += 1
                    continue
                found = Candidate(way, sizes, of(way, c, hardware, sizes, document_tokens))
                ranked.append((found.estimate.step_s * (1 + _PREFERENCE * rank), found))
    if not ranked:
        raise UserError(
            f"no mesh of {hardware} holds {config.batch_rows * config.row_tokens} tokens a step in rows of "
            f"{', '.join(map(str, row_tokens or [config.row_tokens]))}: {too_large} ways divide evenly and none fits "
            "by formula; use more chips, shorter rows or a leaner optimizer state"
        )
    return [found for _, found in sorted(ranked, key=lambda pair: pair[0])]


def _variants(
    config: TrainConfig, row_tokens: Sequence[int], states: Sequence[OptimizerState]
) -> Iterator[tuple[int, TrainConfig]]:
    """The recipe with every row length and state, and the place of the state among those to try."""
    tokens = config.batch_rows * config.row_tokens
    for length in row_tokens or [config.row_tokens]:
        if tokens % length:
            raise UserError(
                f"rows of {length} tokens do not make up a step of {config.batch_rows} x {config.row_tokens} = "
                f"{tokens} evenly; choose other row lengths"
            )
        rows, pieces = tokens // length, dataclasses.replace(config.step, accumulate=1)
        of_length = dataclasses.replace(config, row_tokens=length, batch_rows=rows, step=pieces)
        if not states:
            yield 0, of_length
        for rank, state in enumerate(states):
            dtype: Literal["float32", "bfloat16"] = "bfloat16" if state == "bfloat16" else "float32"
            optimizers = [dataclasses.replace(phase.optim, state_dtype=dtype) for phase in config.phases]
            phases = [dataclasses.replace(p, optim=o) for p, o in zip(config.phases, optimizers, strict=True)]
            step = dataclasses.replace(pieces, offload_moments=state == "offloaded")
            yield rank, dataclasses.replace(of_length, phases=tuple(phases), step=step)


def of(
    config: TrainConfig, c: Config, hardware: Hardware, sizes: dict[str, int], document_tokens: float
) -> roofline.Estimate:
    """The estimate of a way that is not compiled."""
    tokens, pieces = config.batch_rows * config.row_tokens, config.step.accumulate
    step = config.step
    chip = hardware.chip
    scatters = chip.platform != "tpu" or sharding.scatters_over_all(chip.name)
    how_sent = step.remat, tokens // pieces, step.matmul_dtype
    trains_all = not config.lora.rank
    sent = roofline.expected_collectives(c, sizes, *how_sent, scatters_over_all=scatters, trains_all=trains_all)
    repeated = [dataclasses.replace(collective, times=collective.times * pieces) for collective in sent]
    state = _state_bytes(_counts(c, config)[0], config) / (sizes["fsdp"] * sizes["context"] * sizes["tensor"])
    how = step.remat, tokens, document_tokens, state, repeated, step.matmul_dtype, host_bytes(c, config, sizes)
    return roofline.estimate(c, hardware, sizes, *how, trains_all=trains_all)


def _meshes(config: TrainConfig, c: Config, devices: int, device: Any) -> Iterator[tuple[dict[str, int], StepConfig]]:
    """Meshes that split the model, the rows and the heads evenly, and how many rows at a time."""
    divisors = [n for n in range(1, devices + 1) if devices % n == 0]
    for tensor, context in itertools.product(divisors, divisors):
        left = devices // (tensor * context)
        if tensor > _MAX_TENSOR or context > _MAX_CONTEXT or left * tensor * context != devices:
            continue
        for fsdp in (n for n in divisors if left % n == 0):
            sizes = {"data": left // fsdp, "fsdp": fsdp, "context": context, "tensor": tensor}
            if config.batch_rows % left:
                continue
            step = dataclasses.replace(config.step, accumulate=config.batch_rows // left)  # a row each: least memory
            try:
                check_fits(dataclasses.replace(config, step=step), c, sizes, device)
            except UserError:
                continue
            yield sizes, step


def host_bytes(c: Config, config: TrainConfig, sizes: Mapping[str, int]) -> float:
    """Between a device and its host in a step, there and back: moments, and what of layers is kept there."""
    moved = 0.0
    if config.step.offload_moments:
        shards = sizes["fsdp"] * sizes["context"] * sizes["tensor"]
        itemsize = jnp.dtype(config.phases[0].optim.state_dtype).itemsize
        moved += 2 * 2 * itemsize * _counts(c, config)[0] / shards
    inputs = c.embed  # of a layer
    kept = {"offload_inputs": inputs, "offload": inputs + c.heads * c.head_dim / sizes["tensor"]}
    positions = config.batch_rows * config.row_tokens / (sizes["data"] * sizes["fsdp"] * sizes["context"])
    moved += 2 * 2 * c.layers * positions * kept.get(config.step.remat, 0)
    return moved


def _counts(c: Config, config: TrainConfig) -> tuple[int, int]:
    """Weights that are trained, and those that stay beside adapters."""
    trained = weights.count(Trained(config, c).template)
    return trained, weights.count(decoder.template(c)) if config.lora.rank else 0


def _state_bytes(trained: int, config: TrainConfig) -> float:
    """Of trained weights and both of Adam's moments, those that are on the devices."""
    copies = 1 if config.step.offload_moments else 3
    return float(copies * jnp.dtype(config.phases[0].optim.state_dtype).itemsize * trained)


def _expected_bytes(c: Config, config: TrainConfig, sizes: dict[str, int]) -> float:
    """Of one device: state and gradients, what is saved of each layer, and a layer's weights gathered twice."""
    shards = sizes["fsdp"] * sizes["context"] * sizes["tensor"]
    positions = config.row_tokens // sizes["context"]
    trained, frozen = _counts(c, config)
    gradients, kept = 4 * trained, jnp.dtype(config.step.compute_dtype).itemsize * frozen
    state = (_state_bytes(trained, config) + gradients + kept) / shards
    saved = c.layers * positions * c.embed * 2 * _SAVED_WIDTHS[config.step.remat]
    gathered = 2 * 2 * max(c.stored_matmul_weights[0] / c.layers, c.stored_matmul_weights[1]) / sizes["tensor"]
    return state + saved + gathered
