"""Which options a device's programs are compiled with."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import kernels
import pytest

from jaxdistill import chips, compiler, sharding
from jaxdistill.plan import ahead, collectives, hardware
from jaxdistill.sharding import MeshConfig


def test_every_generation_of_the_table_is_a_tpu():
    assert all(chips.CHIPS[name].platform == "tpu" for name in compiler.OPTIONS)


def test_options_are_those_of_the_devices_generation():
    v5p = SimpleNamespace(device_kind="TPU v5", platform="tpu")
    assert compiler.options(v5p) == compiler.OPTIONS["v5p"]
    assert compiler.options(SimpleNamespace(device_kind="TPU v5 lite", platform="tpu")) == {}
    assert compiler.options(SimpleNamespace(device_kind="NVIDIA H100", platform="gpu")) == {}
    assert compiler.options(jax.devices()[0]) == {}


@pytest.mark.parametrize("name", ["v5e:4x4", "v6e:4x4", "v5p:2x2x4"])
@pytest.mark.parametrize(("sizes", "whole"), [({"fsdp": 16}, True), ({"fsdp": 8, "context": 2}, False)], ids=str)
def test_what_is_said_of_tpus_is_what_their_compiler_does(name: str, sizes: dict[str, int], whole: bool):
    """The gradient of a gathered weight, from activations that differ on all devices."""
    kernels.require("libtpu")
    mesh = MeshConfig(**sizes).build(ahead.devices(hardware.parse(name)))
    D = F = 2048
    with jax.set_mesh(mesh):

        def argument(dims: str, table: object, *shape: int) -> jax.ShapeDtypeStruct:
            layout = jax.sharding.NamedSharding(mesh, sharding.spec(dims, table))  # type: ignore[arg-type]
            return jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=layout)

        def loss(w: jax.Array, x: jax.Array) -> jax.Array:
            return jnp.sum(sharding.einsum("BTD,DF->BTF", x, sharding.gather(w, "DF", x.dtype)), dtype=jnp.float32)

        w, x = argument("DF", sharding.STORAGE, D, F), argument("BTD", sharding.COMPUTE, 16, 128, D)
        program = jax.jit(jax.grad(loss)).trace(w, x).lower(lowering_platforms=("tpu",)).compile().as_text()
    reduced = {one.kind for one in collectives.read(program or "") if one.payload_bytes >= D * F // 8}
    assert reduced - {"all-gather"} == ({"all-reduce"} if whole else {"reduce-scatter"})
    assert (sharding.reduced_whole({"D": D}, dict(mesh.shape)) is not None) == whole
