"""Which mesh and which remat policy: every one that divides evenly, ranked by formula; the best are then compiled."""

import dataclasses
import itertools
import typing
from collections.abc import Iterator, Mapping
from typing import Any

import jax.numpy as jnp

from jaxdistill import weights
from jaxdistill.errors import UserError
from jaxdistill.models import decoder
from jaxdistill.models.config import Config
from jaxdistill.models.remat import Remat
from jaxdistill.plan import roofline
from jaxdistill.plan.hardware import Hardware
from jaxdistill.sharding import MeshConfig
from jaxdistill.train import TrainConfig, check_fits
from jaxdistill.train_step import StepConfig

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


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A way to run the recipe, and what formulas say about it."""

    config: TrainConfig
    sizes: dict[str, int]  # of the mesh
    estimate: roofline.Estimate


def candidates(
    config: TrainConfig, c: Config, hardware: Hardware, device: Any, document_tokens: float
) -> list[Candidate]:
    """All ways that divide evenly and should fit, fastest first; the recipe's tokens in a step stay what they are.

    Raises:
      UserError: there is none.
    """
    found, too_large = [], 0
    for sizes, step in _meshes(config, c, hardware.devices, device):
        for remat in typing.get_args(Remat):
            way = dataclasses.replace(config, mesh=MeshConfig(**sizes), step=dataclasses.replace(step, remat=remat))
            if _expected_bytes(c, way, sizes) > USABLE * hardware.device_memory:
                too_large += 1
                continue
            found.append(Candidate(way, sizes, of(way, c, hardware, sizes, document_tokens)))
    if not found:
        raise UserError(
            f"no mesh of {hardware} holds {config.batch_rows} rows of {config.row_tokens} at a time: "
            f"{too_large} ways divide evenly and none fits by formula; use more chips, shorter rows or a leaner "
            "optimizer state"
        )
    return sorted(found, key=lambda candidate: candidate.estimate.step_s)


def of(
    config: TrainConfig, c: Config, hardware: Hardware, sizes: dict[str, int], document_tokens: float
) -> roofline.Estimate:
    """The estimate of a way that is not compiled."""
    tokens, pieces = config.batch_rows * config.row_tokens, config.step.accumulate
    step = config.step
    sent = roofline.expected_collectives(c, sizes, step.remat, tokens // pieces, step.matmul_dtype)
    repeated = [dataclasses.replace(collective, times=collective.times * pieces) for collective in sent]
    state = _state_bytes(c, config) / (sizes["fsdp"] * sizes["tensor"])
    how = step.remat, tokens, document_tokens, state, repeated, step.matmul_dtype
    return roofline.estimate(c, hardware, sizes, *how)


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


def _state_bytes(c: Config, config: TrainConfig) -> float:
    """Weights and both of Adam's moments, those that are on the devices."""
    copies = 1 if config.step.offload_moments else 3
    return float(copies * jnp.dtype(config.phases[0].optim.state_dtype).itemsize * weights.count(decoder.template(c)))


def _expected_bytes(c: Config, config: TrainConfig, sizes: dict[str, int]) -> float:
    """Of one device: state and gradients, what is saved of each layer, and a layer's weights gathered twice."""
    shards = sizes["fsdp"] * sizes["tensor"]
    positions = config.row_tokens // sizes["context"]
    gradients = 4 * weights.count(decoder.template(c))
    state = (_state_bytes(c, config) + gradients) / shards
    saved = c.layers * positions * c.embed * 2 * _SAVED_WIDTHS[config.step.remat]
    gathered = 2 * 2 * max(c.matmul_weights[0] / c.layers, c.matmul_weights[1]) / sizes["tensor"]
    return state + saved + gathered
