"""The sampler's decoding step compiled for hardware that is not here: whether its cache fits, and how fast it reads."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from jaxdistill import weights
from jaxdistill.models import decoder
from jaxdistill.models.config import Config
from jaxdistill.plan import ahead, collectives, roofline
from jaxdistill.plan.collectives import Collective
from jaxdistill.plan.hardware import Hardware
from jaxdistill.sample import cache as kv
from jaxdistill.sample import programs, transfer
from jaxdistill.sample.attention import check_kernel
from jaxdistill.sample.choose import Features
from jaxdistill.sample.engine import EngineConfig
from jaxdistill.sharding import spec

FORMULA = (
    "step_s = (weights of a tensor share, each read once + keys and values of the live positions) / (bandwidth x "
    "share) + ring bytes of every collective / (bandwidth of its links x share); tokens/s = slots / step_s; roofline: "
    "the first term alone with a share of 1"
)


@dataclasses.dataclass(frozen=True)
class Decoding:
    """A decoding step of an engine. Bytes are those on one device."""

    slots: int
    positions: int  # longest prompt and output together
    weights: int
    cache: int
    cache_positions: int  # that the caches of all devices hold
    temporaries: int
    read: float  # of weights and of the cache, in a step
    collectives: list[Collective]
    step_s: float
    roofline_s: float
    compile_s: float

    @property
    def total(self) -> int:
        return self.weights + self.cache + self.temporaries

    @property
    def tokens_per_s(self) -> float:
        return self.slots / self.step_s


def compile_decoding(
    c: Config,
    hardware: Hardware,
    mesh: jax.sharding.Mesh,
    config: EngineConfig,
    positions: int,
    live_tokens: float,
) -> Decoding:
    """Compiles the step that `sample`, `evaluate` and `serve` decode with, drawing at a temperature.

    Args:
      positions: longest prompt and output together, in tokens.
      live_tokens: positions that a slot holds, averaged over slots and time.

    Raises:
      DoesNotFitError: the compiler ran out of a device's memory.
    """
    sizes, dtype = dict(mesh.shape), jnp.dtype(config.compute_dtype)
    shards, parts = sizes["data"] * sizes["fsdp"], sizes["context"] * sizes["tensor"]
    slots = -(-config.slots // shards) * shards
    request_pages = -(-positions // config.page_tokens)
    pages = (config.cache_tokens or slots * request_pages * config.page_tokens) // (config.page_tokens * shards)
    page_bytes = kv.page_bytes(c, config.page_tokens, dtype, config.cache_dtype) // parts
    with jax.set_mesh(mesh):
        stored = weights.abstract(decoder.template(c), dtype)
        params = _abstract(lambda w: programs.per_layer(w, c, dtype, config.weight_dtype), stored)
        cache = _abstract(lambda: kv.empty(c, pages * shards, config.page_tokens, dtype, config.cache_dtype))
        rows = transfer.slots(slots, {}, (), c.vocab, penalties=False)
        by_row = jax.sharding.NamedSharding(mesh, spec("B"))
        state, tables, keep = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=by_row),
            (rows, jax.ShapeDtypeStruct((slots, request_pages), jnp.int32), jax.ShapeDtypeStruct((slots,), jnp.bool_)),
        )
        check_kernel(config.attention, c.head_dim, config.page_tokens // sizes["context"], config.cache_dtype)
        traced = programs.decode.trace(
            params,
            cache,
            state,
            tables,
            keep,
            jax.ShapeDtypeStruct((), jnp.int32),
            c=c,
            dtype=dtype,
            features=Features(draws=True),
            most_steps=config.steps_per_call,
            kernel=config.attention,
        )
        compiled, compile_s = ahead.compile_for(traced, mesh)
        total = ahead.total_bytes(compiled.memory_analysis())
        of_weights = sum(ahead.device_bytes(x, x.sharding.spec) for x in jax.tree.leaves(params))
    sent = collectives.read(compiled.as_text())
    # A device computes with all of its tensor share, wherever along fsdp the rest of it is stored
    read = of_weights * sizes["fsdp"] + slots // shards * live_tokens * page_bytes / config.page_tokens
    chip, share = hardware.chip, roofline.EFFICIENCY[hardware.chip.platform]
    roofline_s = read / (chip.memory_bandwidth / chip.devices)
    wire_s = sum(s.wire_bytes / (roofline.wire_bandwidth(hardware, sizes, s.group) * share.wire) for s in sent)
    return Decoding(
        slots=slots,
        positions=positions,
        weights=of_weights,
        cache=pages * page_bytes,
        cache_positions=pages * shards * config.page_tokens,
        temporaries=total - of_weights - pages * page_bytes,
        read=read,
        collectives=sent,
        step_s=roofline_s / share.memory + wire_s,
        roofline_s=roofline_s,
        compile_s=compile_s,
    )


def _abstract(make: Any, *arguments: Any) -> Any:
    return weights.on_mesh(jax.eval_shape(make, *arguments))
