"""Which options a device's programs are compiled with."""

from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import kernels
import pytest

from jaxdistill import chips, compiler, sharding
from jaxdistill.plan import ahead, collectives, hardware
from jaxdistill.sharding import MeshConfig

D = 2048


def test_every_generation_of_the_table_is_a_tpu():
    assert all(chips.CHIPS[name].platform == "tpu" for name in compiler.OPTIONS)


def test_options_are_those_of_the_devices_generation():
    v5p = SimpleNamespace(device_kind="TPU v5", platform="tpu")
    assert compiler.options(v5p) == compiler.OPTIONS["v5p"]
    assert compiler.options(SimpleNamespace(device_kind="TPU v5 lite", platform="tpu")) == {}
    assert compiler.options(SimpleNamespace(device_kind="NVIDIA H100", platform="gpu")) == {}
    assert compiler.options(jax.devices()[0]) == {}


def gradient_of_a_weight(mesh: jax.sharding.Mesh, options: dict[str, Any]) -> str:
    """The compiled program of it, from activations that differ on all devices."""
    with jax.set_mesh(mesh):

        def argument(dims: str, table: Any, *shape: int) -> jax.ShapeDtypeStruct:
            layout = jax.sharding.NamedSharding(mesh, sharding.spec(dims, table))
            return jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=layout)

        def loss(w: jax.Array, x: jax.Array) -> jax.Array:
            return jnp.sum(sharding.einsum("BTD,DF->BTF", x, sharding.gather(w, "DF", x.dtype)), dtype=jnp.float32)

        w, x = argument("DF", sharding.STORAGE, D, D), argument("BTD", sharding.COMPUTE, 16, 128, D)
        lowered = jax.jit(jax.grad(loss)).trace(w, x).lower(lowering_platforms=("tpu",))
        return lowered.compile(compiler_options=options).as_text() or ""


@pytest.mark.parametrize("name", ["v5e:4x4", "v6e:4x4", "v5p:2x2x4", "tpu7x:2x2x2"])
@pytest.mark.parametrize("sizes", [{"fsdp": 16}, {"fsdp": 8, "context": 2}], ids=str)
def test_what_is_said_of_tpus_is_what_their_compiler_does(name: str, sizes: dict[str, int]):
    kernels.require("libtpu")
    target = hardware.parse(name)
    mesh = MeshConfig(**sizes).build(ahead.devices(target))
    found = collectives.read(gradient_of_a_weight(mesh, {}))
    reduced = {one.kind for one in found if one.payload_bytes >= D * D // 8} - {"all-gather"}
    whole = sharding.reduced_whole({"D": D}, dict(mesh.shape), target.chip.name)
    assert reduced == ({"all-reduce"} if whole else {"reduce-scatter"})
    assert bool(whole) == (sizes == {"fsdp": 16} and target.chip.name != "tpu7x")


@pytest.mark.parametrize("name", ["v5p:2x2x4", "v6e:4x4"])
def test_options_move_collectives_to_the_sparse_cores(name: str):
    kernels.require("libtpu")
    target = hardware.parse(name)
    mesh = MeshConfig(fsdp=8, context=2).build(ahead.devices(target))
    on_sparse_cores = [
        "SPARSECORE" in gradient_of_a_weight(mesh, options)
        for options in ({}, dict(compiler.OPTIONS[target.chip.name]))
    ]
    assert on_sparse_cores == [False, True]
