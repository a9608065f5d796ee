"""Qwen3's mixture of experts: routing against a plain loop, what config.json may ask for, and what is refused."""

from typing import Any

import jax
import numpy as np
import pytest
import tiny

from jaxdistill import sharding
from jaxdistill.errors import UserError
from jaxdistill.models import decoder, quantized, qwen3_moe
from jaxdistill.models.lora import LoraConfig
from jaxdistill.models.lora import template as adapters
from jaxdistill.sample.engine import Engine, EngineConfig
from jaxdistill.sample.request import Request, SamplingConfig


def silu(x: np.ndarray) -> np.ndarray:
    return x / (1 + np.exp(-x))


@pytest.mark.parametrize("normed", [True, False])
def test_experts_are_those_of_a_loop_over_tokens(normed: bool):
    """Two experts get every token and the last one none, so that groups of rows are full and empty."""
    c = tiny.config("qwen3_moe", norm_topk_prob=normed)
    E, D, f, chosen = c.experts, c.embed, c.mlp, c.experts_per_token
    assert (E, f, chosen, c.normed_choice) == (8, 24, 3, normed)
    generator = np.random.default_rng(0)
    x, scores = generator.normal(size=(2, 5, D)), generator.normal(size=(2, 5, E))
    scores[..., [1, 6]] += 5
    scores[..., -1] -= 9
    gate, up, down = (generator.normal(size=shape) / 5 for shape in ((E, D, f), (E, D, f), (E, f, D)))
    expected = np.zeros_like(x)
    for at in np.ndindex(2, 5):
        shares = np.exp(scores[at]) / np.exp(scores[at]).sum()
        best = np.argsort(-shares)[:chosen]
        total = shares[best].sum() if normed else 1.0
        for e in best:
            expected[at] += shares[e] / total * ((silu(x[at] @ gate[e]) * (x[at] @ up[e])) @ down[e])
    with tiny.mesh(), jax.default_matmul_precision("highest"):
        of_tokens = [sharding.put(a.astype(np.float32), dims) for a, dims in ((x, "BTD"), (scores, "BT."))]
        stored = ((gate, "EDf"), (up, "EDf"), (down, "EfD"))
        of_experts = [sharding.put(a.astype(np.float32), dims, sharding.STORAGE) for a, dims in stored]
        found = jax.jit(qwen3_moe.experts, static_argnums=5)(*of_tokens, *of_experts, c)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


def test_greedy_tokens_are_the_same_where_experts_are_split():
    c = tiny.config("qwen3_moe")
    config = EngineConfig(slots=4, page_tokens=16, prefill_tokens=32, compute_dtype="float32")
    prompts = [tuple(document.tokens.tolist()) for document in tiny.documents((30, 20, 9), vocab=c.vocab)]
    requests = [Request(str(i), prompt, SamplingConfig(max_new_tokens=8)) for i, prompt in enumerate(prompts)]
    found = []
    for sizes in ({}, {"fsdp": 2, "context": 2, "tensor": 2}):
        with tiny.mesh(**sizes), jax.default_matmul_precision("highest"):
            engine = Engine(tiny.put(tiny.values(c), c), c, (), positions=64, config=config)
            found.append({output.id: output.tokens for output in engine.generate(requests)})
    assert found[0] == found[1]
    assert {len(tokens) for tokens in found[0].values()} == {8}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"decoder_sparse_step": 2}, "decoder_sparse_step is 2, implemented is 1"),
        ({"mlp_only_layers": [0]}, r"mlp_only_layers is \[0\], implemented is \[\]"),
        ({"num_experts_per_tok": 9}, "num_experts_per_tok is 9, of 8 experts; expected 1 to 8"),
        ({"num_experts": None, "moe_intermediate_size": None}, "num_experts, moe_intermediate_size missing"),
    ],
)
def test_models_that_are_refused(changes: dict[str, Any], message: str):
    with pytest.raises(UserError, match=message):
        tiny.config("qwen3_moe", **changes)


def test_only_chosen_experts_count_as_work():
    c, wider = tiny.config("qwen3_moe"), tiny.config("qwen3_moe", num_experts=16)
    D, per_layer = c.embed, c.embed * c.head_dim * 2 * (c.heads + c.kv_heads)
    assert c.matmul_weights == (2 * (per_layer + 3 * 3 * D * 24 + 8 * D), 96 * D)
    assert c.stored_matmul_weights == (2 * (per_layer + 8 * 3 * D * 24 + 8 * D), 96 * D), "all eight are gathered"
    assert wider.flops_per_token(10) - c.flops_per_token(10) == 6 * 2 * 8 * D, "the router alone is wider"


def test_total_and_active_parameters_of_qwen3_30b_a3b():
    c = tiny.config(
        "qwen3_moe",
        vocab_size=151_936,
        hidden_size=2048,
        num_hidden_layers=48,
        num_attention_heads=32,
        num_key_value_heads=4,
        head_dim=128,
        num_experts=128,
        num_experts_per_tok=8,
        moe_intermediate_size=768,
    )
    assert decoder.size(c) == "30,532,122,624 parameters, 3,353,032,704 of them active for a token"
    assert decoder.size(tiny.config("qwen3")).endswith(" parameters"), "all of a dense model's are"


def test_adapters_of_experts_are_refused():
    model = decoder.template(tiny.config("qwen3_moe"))
    with pytest.raises(UserError, match=r"experts.\{\}.gate_proj, .* not implemented: set it to \*self_attn"):
        adapters(LoraConfig(rank=2), model)
    assert sorted(adapters(LoraConfig(rank=2, weights=("*self_attn.*_proj",)), model)) == ["w_k", "w_o", "w_q", "w_v"]


def test_experts_in_8_bits_are_refused():
    quantized.check_model("compute", tiny.config("qwen3_moe"))
    quantized.check_model("int8", tiny.config("qwen3"))
    with pytest.raises(UserError, match="int8 for the weights of a qwen3_moe: experts in 8 bits are not implemented"):
        quantized.check_model("int8", tiny.config("qwen3_moe"))
