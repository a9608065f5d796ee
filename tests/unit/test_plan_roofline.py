"""Step times by formula: what they are made of, and how they change with the hardware."""

import dataclasses
import typing
from typing import Any

import jax
import jax.numpy as jnp
import pytest
import tiny

from jaxdistill import chips
from jaxdistill.models.config import Config
from jaxdistill.models.quantized import MatmulDtype
from jaxdistill.models.remat import Remat
from jaxdistill.plan import collectives, hardware, roofline
from jaxdistill.plan.collectives import Collective
from jaxdistill.plan.roofline import Estimate
from jaxdistill.train.step import loss_sum

MESH = {"data": 1, "fsdp": 16, "context": 1, "tensor": 1}


def model() -> Config:
    """Qwen2.5-7B."""
    return tiny.config(
        "qwen2",
        vocab_size=152_064,
        hidden_size=3584,
        intermediate_size=18_944,
        num_hidden_layers=28,
        num_attention_heads=28,
        num_key_value_heads=4,
        head_dim=128,
    )


def estimate(
    name: str,
    remat: Remat = "none",
    wire: tuple[Collective, ...] = (),
    matmul_dtype: MatmulDtype = "compute",
    **changes: Any,
) -> Estimate:
    values: dict[str, Any] = {"tokens": 2**20, "document_tokens": 32_768.0, "state_bytes": 0.0} | changes
    target = hardware.parse(name)
    mesh = MESH | {"fsdp": target.devices}
    return roofline.estimate(model(), target, mesh, remat, wire=wire, matmul_dtype=matmul_dtype, **values)


def test_flops_are_those_that_mfu_counts():
    """At full efficiency, with nothing but matrix products and attention's own backward pass, MFU would be one."""
    c, share = model(), roofline.EFFICIENCY["tpu"]
    for trains_all in (True, False):
        found = estimate("v5p:4x4x4", trains_all=trains_all)
        spent = found.matmul_s * share.matmul + found.attention_s * share.attention * 6 / 7
        assert spent * found.peak_flops == pytest.approx(2**20 * c.flops_per_token(32_768, trains_all=trains_all))
    assert c.flops_per_token(0, trains_all=False) == pytest.approx(4 * 7.07e9, rel=0.01), "no gradients of weights"
    assert c.flops_per_token(0) == pytest.approx(6 * (7.07e9), rel=0.01)  # Qwen2.5-7B without its embedding lookup


def test_what_is_recomputed_costs_a_third_of_the_layers_again():
    kept, recomputed = estimate("v5p:4x4x4"), estimate("v5p:4x4x4", "full")
    layers, head = model().matmul_weights
    assert recomputed.matmul_s / kept.matmul_s == pytest.approx((8 * layers + 6 * head) / (6 * layers + 6 * head))
    assert recomputed.attention_s / kept.attention_s == pytest.approx(9 / 7)
    assert recomputed.mfu < kept.mfu


@pytest.mark.parametrize(("name", "matmul_dtype"), [("h100x8", "float8"), ("v5p:4x4x4", "int8"), ("v6e:8x8", "int8")])
def test_8_bits_halve_two_of_three_products_of_the_layers_and_mfu_counts_as_before(name: Any, matmul_dtype: Any):
    plain, found = estimate(name), estimate(name, matmul_dtype=matmul_dtype)
    layers, head = model().matmul_weights
    spared = (2 * layers + 4 * layers / 2 + 6 * head) / (6 * layers + 6 * head)
    assert found.matmul_s / plain.matmul_s == pytest.approx(spared, rel=2e-3)
    assert (found.peak_flops, found.model_flops) == (plain.peak_flops, plain.model_flops)
    assert found.memory_s > plain.memory_s, "what is multiplied is rounded first"
    assert found.mfu > plain.mfu


def test_8_bits_halve_the_bytes_of_gathered_layers():
    sent = roofline.expected_collectives
    plain, found = (sent(model(), MESH, "full", 2**20, dtype) for dtype in ("compute", "int8"))
    moved = [sum(c.payload_bytes * c.times for c in some if c.kind == "all-gather") for some in (plain, found)]
    assert moved[0] - moved[1] == 2 * model().matmul_weights[0]


def test_every_remat_policy_is_known():
    assert set(roofline.RECOMPUTED) == set(typing.get_args(Remat))


def test_twice_the_chips_take_half_the_time():
    one, two = estimate("v6e:8x8"), estimate("v6e:8x16")
    assert two.step_s == pytest.approx(one.step_s / 2)
    assert two.mfu == pytest.approx(one.mfu)


def test_collectives_are_hidden_wholly_or_not_at_all():
    sent = Collective("all-gather", 10**9, 64, "bf16", 28)
    without, found = estimate("v5p:4x4x4"), estimate("v5p:4x4x4", wire=(sent,))
    assert found.wire_s == pytest.approx(28 * 1e9 * 63 / 64 / (600e9 * roofline.EFFICIENCY["tpu"].wire))
    assert found.fastest_s == pytest.approx(max(without.step_s, found.wire_s))
    assert found.slowest_s == pytest.approx(without.step_s + found.wire_s)
    assert found.fastest_s <= found.step_s <= found.slowest_s
    assert dataclasses.replace(found, wire_s=10 * found.busy_s).bound == "wire"


@pytest.mark.parametrize(
    ("name", "mesh", "group", "expected"),
    [
        ("v5p:4x8x8", {"data": 1, "fsdp": 64, "context": 4, "tensor": 1}, 4, 600e9 / 3),  # one ring
        ("v5p:4x8x8", {"data": 1, "fsdp": 64, "context": 4, "tensor": 1}, 64, 600e9 * 2 / 3),  # a plane
        ("v5p:4x8x8", {"data": 1, "fsdp": 256, "context": 1, "tensor": 1}, 256, 600e9),
        ("tpu7x:4x4x4", {"data": 1, "fsdp": 128, "context": 1, "tensor": 1}, 128, 300e9),  # a chip is two devices
        ("h100x8", {"data": 1, "fsdp": 8, "context": 1, "tensor": 1}, 8, 450e9),
        ("h100x128", {"data": 1, "fsdp": 128, "context": 1, "tensor": 1}, 128, 8 * 50e9),  # all cards of a node
        ("h100x128", {"data": 1, "fsdp": 16, "context": 1, "tensor": 8}, 16, 50e9),  # one member on a node
        ("h100x128", {"data": 1, "fsdp": 16, "context": 1, "tensor": 8}, 8, 450e9),
        ("h100x128", {"data": 16, "fsdp": 4, "context": 2, "tensor": 1}, 4, 450e9),
    ],
)
def test_a_group_has_the_links_that_it_spans(name: str, mesh: dict[str, int], group: int, expected: float):
    assert roofline.wire_bandwidth(hardware.parse(name), mesh, group) == pytest.approx(expected)


def test_devices_are_told_from_those_with_longer_names():
    kinds = {
        "TPU v5": "v5p",
        "TPU v5 lite": "v5e",
        "TPU v6 lite": "v6e",
        "TPU v4": "v4",
        "NVIDIA H100 80GB HBM3": "h100",
    }
    for kind, name in kinds.items():
        found = chips.of_device(kind)
        assert found is not None
        assert found.name == name
    assert chips.of_device("cpu") is None


def test_a_mixture_gathers_all_experts_as_the_compiler_does():
    """Qwen3-30B-A3B with rows of 32,768 on 64 chips of v5p, data 4 x fsdp 16: MiB that libtpu 0.0.48 has a device send.

    Compiled once, in 413 s (`plan` on v5p:4x4x4); the gradient of the head, in float32, counts for half there.
    """
    heads = {"num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128}
    experts = {"num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 768}
    shape = {"vocab_size": 151_936, "hidden_size": 2048, "num_hidden_layers": 48}
    c = tiny.config("qwen3_moe", **shape, **heads, **experts)
    mesh = {"data": 4, "fsdp": 16, "context": 1, "tensor": 1}
    sent = roofline.expected_collectives(c, mesh, "full", 2**21)
    found = {one.kind: one.wire_bytes / 2**20 for one in sent}
    compiled = {"all-gather": 107_521.4, "reduce-scatter": 53_482.5 + 1_112.8 / 2, "all-reduce": 5_348.2 + 222.6 / 2}
    assert found == pytest.approx(compiled, rel=0.02)


def test_the_routers_scores_are_what_a_mixture_gathers_over_tensor():
    c = tiny.config("qwen3_moe", num_experts=16)
    with tiny.mesh(tensor=2):
        params, batch = tiny.put(tiny.values(c), c), tiny.place(tiny.packed([61, 33, 29, 17], c.vocab, 2, 128))
        of_step = jax.jit(jax.grad(lambda params: loss_sum(params, batch, c, jnp.float32, "full", None)))
        compiled = collectives.read(of_step.lower(params).compile().as_text() or "")
    mesh = {"data": 1, "fsdp": 1, "context": 1, "tensor": 2}
    expected = roofline.expected_collectives(c, mesh, "full", 2 * 128)
    of_both = [
        sum(one.payload_bytes * one.times // width for one in some if (one.kind, one.group) == ("all-gather", 2))
        for some, width in ((compiled, 4), (expected, 2))
    ]
    assert of_both[0] == of_both[1] == 2 * c.layers * 2 * 128 * c.experts, "in the forward pass, and recomputed"
