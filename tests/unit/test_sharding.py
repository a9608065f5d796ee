"""The letter tables: which layouts they give, and what is moved."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from jaxdistill import sharding
from jaxdistill.errors import RunError, UserError


def test_every_axis_of_the_tables_is_on_the_mesh():
    for table in (sharding.STORAGE, sharding.COMPUTE):
        for axes in table.values():
            assert set((axes,) if isinstance(axes, str) else axes or ()) <= set(sharding.MESH_AXES)
    assert {"data", "fsdp", "context"} == sharding.TOKEN_AXES


def test_spec_follows_the_letters():
    assert sharding.spec("BTD") == jax.P(("data", "fsdp"), "context", None)
    assert sharding.spec("VD", sharding.STORAGE) == jax.P("tensor", ("fsdp", "context"))
    assert sharding.spec("LDNH", sharding.STORAGE) == jax.P(None, ("fsdp", "context"), "tensor", None)


def test_einsum_lays_its_result_out_by_the_letters():
    with tiny.mesh(fsdp=2, tensor=4):
        x = sharding.put(np.ones((4, 8, 16), np.float32), "BTD")
        w = jax.device_put(np.ones((16, 8), np.float32), sharding.spec("DF", sharding.STORAGE))
        out = jax.jit(lambda x, w: sharding.einsum("BTD,DF->BTF", x, sharding.gather(w, "DF", jnp.float32)))(x, w)
        assert out.sharding.spec == jax.P(("data", "fsdp"), "context", "tensor")
        np.testing.assert_array_equal(out, 16.0)


def test_gradient_of_a_gathered_weight_is_scattered_axis_by_axis_before_it_is_reduced_further():
    """ZeRO-3: only a device's own part crosses `data` (tests/mesh counts the bytes)."""
    with tiny.mesh(data=2, fsdp=2, context=2) as mesh:
        w = jax.device_put(
            np.ones((16, 8), np.float32), jax.sharding.NamedSharding(mesh, sharding.spec("DF", sharding.STORAGE))
        )
        x = sharding.put(np.ones((8, 4, 16), np.float32), "BTD")

        def loss(w: jax.Array, x: jax.Array) -> jax.Array:
            return jnp.sum(sharding.einsum("BTD,DF->BTF", x, sharding.gather(w, "DF", jnp.float32)))

        lowered = jax.jit(jax.grad(loss)).lower(w, x)
        gradient = lowered.compile()(w, x)
        assert gradient.sharding.spec == w.sharding.spec
        np.testing.assert_array_equal(gradient, 32.0)
        lines = lowered.as_text().splitlines()
        [own] = [line for line in lines if "manual_computation" in line]
        assert 'in_shardings=[<@mesh, [{}, {"tensor"}], unreduced={"data", "fsdp", "context"}>]' in own
        assert 'out_shardings=[<@mesh, [{"fsdp", "context"}, {"tensor"}], unreduced={"data"}>]' in own
        over_fsdp, over_context = (line for line in lines if "reduce_scatter" in line)
        # The devices as jax names them before 0.12, or the axis as it does since
        assert "[[0, 2], [1, 3], [4, 6], [5, 7]]" in over_fsdp or 'axis_ref<name = "fsdp">' in over_fsdp
        assert "[[0, 1], [2, 3], [4, 5], [6, 7]]" in over_context or 'axis_ref<name = "context">' in over_context
        stored = [line for line in lines if "sharding_constraint" in line][-1]
        assert '[{"fsdp", "context"}, {"tensor"}]' in stored
        assert "unreduced" not in stored


def test_misfits_are_named_together():
    sizes = {"V": 10, "D": 16, "N": 3, "H": 7}
    with pytest.raises(UserError) as caught:
        sharding.check_divisible(sizes, tiny.ONE_DEVICE | {"fsdp": 4, "tensor": 2})
    assert "N = 3 is not a multiple of 2 (tensor)" in str(caught.value)
    assert "V" not in str(caught.value).split("fit:")[1].split("(letters")[0]
    with pytest.raises(UserError, match=r"D = 16 is not a multiple of 32 \(fsdp x context\)"):
        sharding.check_divisible(sizes, tiny.ONE_DEVICE | {"fsdp": 8, "context": 4})
    sharding.check_divisible(sizes, tiny.ONE_DEVICE)


def test_parts_too_narrow_for_a_tpu():
    sizes = {"V": 152064, "D": 8192, "F": 29568}
    for fsdp in (1, 64):
        assert sharding.reduced_whole(sizes, tiny.ONE_DEVICE | {"data": 2, "fsdp": fsdp, "context": 4}, "v5e") is None
    warning = sharding.reduced_whole(sizes, tiny.ONE_DEVICE | {"fsdp": 256}, "v5e")
    assert warning is not None
    assert warning.startswith("mesh.fsdp 256 leaves 32 of D = 8192 on a device;")
    assert "With mesh.fsdp 64 or less" in warning
    assert sharding.reduced_whole({"D": 64}, tiny.ONE_DEVICE, "v5e") is None, "nothing is gathered"
    for axis, other in (("fsdp", "context"), ("context", "fsdp")):
        warning = sharding.reduced_whole(sizes, tiny.ONE_DEVICE | {axis: 16}, "v5e")
        assert warning is not None
        assert warning.startswith(f"mesh.{axis} 16 is all devices,")
        assert f"With a part of them in mesh.{other}," in warning
        assert sharding.reduced_whole(sizes, tiny.ONE_DEVICE | {axis: 16, "data": 2}, "v5e") is None
        assert sharding.reduced_whole(sizes, tiny.ONE_DEVICE | {axis: 16}, "tpu7x") is None


def test_one_process_reads_all_rows():
    with tiny.mesh(data=2, fsdp=2, tensor=2):
        assert sharding.own_rows(2, 4) == set(range(8))


@pytest.mark.parametrize("shards", [1, 2, 4])
def test_row_order_gives_each_shard_a_chunk_of_either_end(shards: int):
    order = sharding.row_order(16, shards).reshape(shards, -1)
    assert sorted(order.ravel()) == list(range(16))
    if shards > 1:
        assert order[0].tolist() == [*range(16 // shards // 2), *range(16 - 16 // shards // 2, 16)]
    work = (order + 1).sum(axis=1)  # keys that the queries of a document as long as the row see
    assert len(set(work)) == 1


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int32"])
def test_copies_that_differ_are_found(dtype: str):
    """On one device of those that hold the same rows, two values have changed places."""
    with tiny.mesh(data=2, context=2, tensor=2) as mesh:
        layout = jax.sharding.NamedSharding(mesh, sharding.spec("BT"))
        good = jax.device_put(np.arange(32).reshape(4, 8).astype(dtype), layout)
        sharding.check_replicas({"tokens": good}, "batch")
        parts = [np.array(shard.data) for shard in good.addressable_shards]
        parts[5][0, :2] = parts[5][0, 1::-1]
        places = [shard.device for shard in good.addressable_shards]
        arrays = [jax.device_put(part, place) for part, place in zip(parts, places, strict=True)]
        bad = jax.make_array_from_single_device_arrays(good.shape, layout, arrays)
        with pytest.raises(RunError, match=r"batch\['tokens'\]: devices along tensor should hold the same"):
            sharding.check_replicas({"other": good, "tokens": bad}, "batch")
