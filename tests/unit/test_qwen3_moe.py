"""Qwen3's mixture of experts: routing against a plain loop, what config.json may ask for, and what is refused."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny

from jaxdistill import lora, sharding, weights
from jaxdistill.errors import UserError
from jaxdistill.models import decoder, quantized, qwen3_moe, routing
from jaxdistill.models.attention import REFERENCE
from jaxdistill.models.lora import LoraConfig, apply
from jaxdistill.models.lora import template as adapters
from jaxdistill.sample.engine import Engine, EngineConfig
from jaxdistill.sample.request import Request, SamplingConfig
from jaxdistill.train import step as train_step


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

        @jax.jit
        def through(x: jax.Array, scores: jax.Array, *of_experts: jax.Array) -> jax.Array:
            share, expert, _ = routing.choose(scores, jnp.ones((2, 5), bool), c)
            return qwen3_moe.experts(x, share, expert, *of_experts)

        found = through(*of_tokens, *of_experts)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


@pytest.fixture
def _compiled_in_a_hurry():
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.mark.usefixtures("_compiled_in_a_hurry")
def test_a_step_adds_the_loss_that_balances_experts_and_says_how_uneven_they_are():
    """Pieces of 40 and 20 tokens count by those: the gradient is that of the formula, written out here."""
    c = tiny.config("qwen3_moe", output_router_logits=True, router_aux_loss_coef=0.25)
    pieces = [tiny.packed([length + 1], c.vocab, rows=1, row_tokens=48, seed=length) for length in (40, 20)]
    with tiny.mesh(), jax.default_matmul_precision("highest"):
        params, optimizer = tiny.put(tiny.values(c), c), optax.sgd(1.0)
        placed = [tiny.place(piece) for piece in pieces]
        how = jnp.float32, "none", None, REFERENCE, "compute"

        @jax.jit
        @jax.value_and_grad
        def written_out(params: decoder.Params) -> jax.Array:
            found = [train_step.loss_sum_and_routing(params, piece, c, *how) for piece in placed]
            uneven = [routing.balance_loss(routed, c)[0] for _, routed in found]
            loss = (found[0][0] + found[1][0]) / sum(piece.weights.sum() for piece in placed)
            return loss + 0.25 * (2 / 3 * uneven[0] + 1 / 3 * uneven[1])

        value, gradients = jax.device_get(written_out(params))
        before = jax.device_get(params)
        together = jax.tree.map(lambda *leaves: np.concatenate(leaves), *pieces)
        config = train_step.StepConfig(accumulate=2, compute_dtype="float32")
        step = train_step.make_step(config, REFERENCE, c, optimizer)
        state, said = step(train_step.new_state(params, optimizer, seed=0), train_step.place(together, 2))
        after = jax.device_get(state.params)
    tiny.assert_trees_close(jax.tree.map(np.subtract, before, after), gradients, 1e-5)
    assert float(said["loss"] + 0.25 * said["router_aux_loss"]) == pytest.approx(float(value), rel=1e-5)
    assert set(said) == {"loss", "router_aux_loss", "expert_load_max", "grad_norm", "loss_tokens", "good"}
    assert 1 < float(said["expert_load_max"]) <= c.experts / c.experts_per_token


def test_how_uneven_experts_are():
    """In one layer all tokens go to the first three of eight experts, in the other evenly to all."""
    c = tiny.config("qwen3_moe")
    tokens = np.zeros((2, 1, 1, 8), np.float32)
    tokens[0, ..., :3], tokens[1] = 80, 30
    for probability, expected in (
        (np.full_like(tokens, 10), 3.0),
        (tokens / 3, 8 * (3 * 110**2 + 5 * 30**2) / (3 * 160**2)),
    ):
        found, of_experts = routing.balance_loss(routing.Routing(tokens, probability), c)
        assert float(found) == pytest.approx(expected)
        np.testing.assert_array_equal(of_experts, tokens[:, 0, 0])


def test_when_experts_are_balanced():
    """By transformers' own rule, which needs `output_router_logits`, or where the recipe says so."""
    quiet = tiny.config("qwen3_moe", router_aux_loss_coef=0.25)
    told = tiny.config("qwen3_moe", router_aux_loss_coef=0.25, output_router_logits=True)
    default, off, strong = (train_step.StepConfig(router_aux_loss_coef=x) for x in (None, 0.0, 0.01))
    assert [default.balance(c) for c in (quiet, told, tiny.config("qwen3"))] == [0, 0.25, 0]
    assert [off.balance(told), off.balance(tiny.config("qwen3")), strong.balance(quiet)] == [0, 0, 0.01]
    with pytest.raises(UserError, match=r"router_aux_loss_coef is 0.01, but a qwen3 has no experts"):
        strong.balance(tiny.config("qwen3"))
    with pytest.raises(UserError, match=r"router_aux_loss_coef is -1.0; expected 0"):
        train_step.StepConfig(router_aux_loss_coef=-1.0)


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


@pytest.mark.usefixtures("_compiled_in_a_hurry")
def test_adapters_of_attention_beside_experts():
    """On a mesh that splits the experts: the loss is that of the merged weights, and only adapters have a gradient."""
    c, settings = tiny.config("qwen3_moe"), LoraConfig(rank=2, weights=("*self_attn.*_proj",))
    declared = adapters(settings, decoder.template(c))
    random = jax.tree.map(
        lambda w: dataclasses.replace(w, init=weights.Initializer(0.0, 0.3)), declared, is_leaf=weights.is_declared
    )
    with tiny.mesh(fsdp=2, tensor=2), jax.default_matmul_precision("highest"):
        params, made = tiny.put(tiny.values(c), c), weights.init(random, seed=5)
        rows = tiny.place(tiny.packed([40, 23], c.vocab, rows=2, row_tokens=48))

        @jax.jit
        def loss(params: Any) -> jax.Array:
            return train_step.loss_sum(params, rows, c, jnp.float32, "none", None)

        beside = jax.jit(jax.value_and_grad(lambda a: loss(apply(params, a, settings))))
        found, gradients = beside(made)
        expected, without = loss(lora.merge(params, made, settings)), loss(params)
    assert float(found) == pytest.approx(float(expected), rel=1e-5)
    assert abs(float(found) / float(without) - 1) > 1e-3
    assert all(np.abs(g).max() > 0 for g in jax.tree.leaves(gradients))


def test_experts_in_8_bits_are_refused():
    quantized.check_model("compute", tiny.config("qwen3_moe"))
    quantized.check_model("int8", tiny.config("qwen3"))
    with pytest.raises(UserError, match="int8 for the weights of a qwen3_moe: experts in 8 bits are not implemented"):
        quantized.check_model("int8", tiny.config("qwen3_moe"))
