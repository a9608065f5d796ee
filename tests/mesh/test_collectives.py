"""What a training step sends between devices, counted in a model whose weights outweigh its activations.

Counted in the HLO right after partitioning: later the CPU's own passes turn bfloat16 collectives into float32 ones.
"""

from pathlib import Path
from typing import Any

import jax
import pytest
import tiny

from jaxdistill import optim, weights
from jaxdistill.models import decoder
from jaxdistill.models.attention import REFERENCE
from jaxdistill.models.quantized import MatmulDtype
from jaxdistill.plan import collectives
from jaxdistill.plan.collectives import Collective
from jaxdistill.train import step as train_step

ROWS, T = 8, 8
C = tiny.config(
    "qwen2",
    vocab_size=4096,
    hidden_size=256,
    intermediate_size=1024,
    num_attention_heads=8,
    num_key_value_heads=8,
    head_dim=64,
    num_hidden_layers=1,
)
TABLE = C.vocab * C.embed  # elements of the embedding, and of the head
_DECLARED = jax.tree.leaves(decoder.template(C).blocks, is_leaf=weights.is_declared)
MATRICES = weights.count([w for w in _DECLARED if len(w.hf_shape) == 2])  # elements of those of the layer
MESHES = [
    {"data": 8},
    {"tensor": 8},
    {"data": 2, "fsdp": 4},
    {"fsdp": 4, "context": 2},
    {"data": 4, "context": 2},
    {"fsdp": 4, "tensor": 2},
    {"fsdp": 2, "context": 2, "tensor": 2},
]


def collectives_of_a_step(sizes: dict[str, int], dump: Path, matmul_dtype: MatmulDtype = "compute") -> list[Collective]:
    """Those of a step in bfloat16 that move more than activations."""
    config = train_step.StepConfig(compute_dtype="bfloat16", matmul_dtype=matmul_dtype)
    with tiny.mesh(**sizes):
        optimizer = optim.make(optim.OptimConfig(), 2, decoder.template(C))
        state = train_step.abstract_state(decoder.template(C), optimizer, "float32")
        batch = train_step.place(tiny.packed([T - 1] * ROWS, C.vocab, ROWS, T), 1)
        program: Any = train_step.make_step(config, REFERENCE, C, optimizer)
        options: dict[str, Any] = {"xla_dump_to": str(dump), "xla_dump_hlo_pass_re": "spmd-partitioning"}
        options |= {"xla_llvm_disable_expensive_passes": True, "xla_backend_optimization_level": 0}
        program.lower(state, batch).compile(compiler_options=options)
    [text] = dump.glob("*after_spmd-partitioning*")
    rows = ROWS // (sizes["data"] * sizes["fsdp"])
    activations = rows * T * max(4 * C.embed, 2 * C.kv_heads * C.head_dim)  # hidden states in float32; keys of all rows
    found = collectives.read(text.read_text())
    return [c for c in found if c.group > 1 and c.payload_bytes > activations]


@pytest.fixture(scope="module", params=MESHES, ids=str)
def step(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[dict[str, int], list[Collective]]:
    """A mesh, and the collectives of a step on it."""
    sizes = tiny.ONE_DEVICE | request.param
    return sizes, collectives_of_a_step(sizes, tmp_path_factory.mktemp("hlo"))


def hops(sizes: dict[str, int]) -> list[tuple[str, int]]:
    """Axes that weights are gathered over, last first, and how many devices each share of a weight is split over."""
    found = [("fsdp", sizes["tensor"]), ("context", sizes["tensor"] * sizes["fsdp"])]
    return [(axis, shares) for axis, shares in found if sizes[axis] > 1]


def test_weights_are_gathered_axis_by_axis_in_bfloat16_and_the_embedding_never(step: Any):
    sizes, found = step
    gathers = [c for c in found if c.kind == "all-gather"]
    assert {(c.dtype, c.group) for c in gathers} == {("bf16", sizes[axis]) for axis, _ in hops(sizes)}
    for group in {c.group for c in gathers}:
        moved = [c.payload_bytes for c in gathers if c.group == group]
        shares = [parts for axis, parts in hops(sizes) if sizes[axis] == group]
        heads = [2 * TABLE // parts for parts in shares]
        assert all(moved.count(head) == 1 for head in heads), "of the loss; the lookup's table stays where it is"
        of_layer = sum(moved) - sum(heads)
        assert of_layer <= sum(2 * 2 * MATRICES // parts for parts in shares), "for the forward and the backward pass"


def test_gradients_are_scattered_axis_by_axis_and_only_parts_of_them_cross_data(step: Any):
    """Matrices' gradients travel in bfloat16; the head's and the embedding's, added up in float32, in that."""
    sizes, found = step
    reductions = [c for c in found if c.kind in ("reduce-scatter", "all-reduce")]
    assert {c.kind for c in found} <= {"all-gather", "reduce-scatter", "all-reduce"}
    expected = {"bf16": 0, "f32": 0}
    for _, shares in hops(sizes):  # the lookup's gradient is not among them: tokens travel to the parts of the table
        expected["bf16"] += 2 * MATRICES // shares
        expected["f32"] += 4 * TABLE // shares
    if sizes["data"] > 1:
        shares = sizes["tensor"] * sizes["fsdp"] * sizes["context"]
        expected["bf16"] += 2 * MATRICES // shares
        expected["f32"] += 2 * 4 * TABLE // shares
    moved = {dtype: sum(c.payload_bytes for c in reductions if c.dtype == dtype) for dtype in expected}
    assert moved == expected
    assert {c.group for c in reductions if c.kind == "all-reduce"} == ({sizes["data"]} - {1})


def test_weights_in_8_bits_are_gathered_in_8_bits(tmp_path: Path):
    sizes = tiny.ONE_DEVICE | {"fsdp": 4, "tensor": 2}
    found = collectives_of_a_step(sizes, tmp_path, "int8")
    moved = {
        dtype: sum(c.payload_bytes for c in found if (c.kind, c.dtype) == ("all-gather", dtype))
        for dtype in ("s8", "bf16", "f32")
    }
    assert moved == {"s8": 2 * MATRICES // sizes["tensor"], "bf16": 2 * TABLE // sizes["tensor"], "f32": 0}
