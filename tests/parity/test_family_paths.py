"""Families that need more than Llama's layers, on every path: gradients of packed rows, and sampling from a cache."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from jaxdistill import export_check, hf
from jaxdistill.data import packing
from jaxdistill.hf_tensors import Stacked
from jaxdistill.models import decoder, routing
from jaxdistill.sample.engine import Engine, EngineConfig
from jaxdistill.sample.request import Request, SamplingConfig
from jaxdistill.train.step import loss_sum

FAMILIES = ("mistral", "phi3", "gemma2", "gemma3_text", "olmo2", "qwen3_moe")
LENGTHS = (101, 70)  # of documents, tokens; windows are 48 keys


@pytest.fixture(scope="module", params=FAMILIES)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    values = tiny.hf_config(request.param, tied=True)
    c = tiny.config(request.param, tied=True)
    return tiny.write_folder(tmp_path_factory.mktemp("family") / request.param, values, tiny.values(c), c, False)


def theirs(folder: Path) -> Any:
    import torch
    import transformers

    how = "eager" if folder.name == "gemma2" else "sdpa"  # which alone caps scores
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation=how)
    return model.eval()


def test_gradients_of_a_packed_row_are_those_of_its_documents_in_transformers(folder: Path):
    """Packed here, one document after another there."""
    import torch

    documents = tiny.documents(LENGTHS, vocab=96)
    model, wanted = theirs(folder), 0.0
    for document in documents:
        tokens = torch.from_numpy(document.tokens.astype(np.int64))
        logprobs = model(tokens[None, :-1]).logits[0].log_softmax(-1)
        chosen = logprobs[torch.arange(len(tokens) - 1), tokens[1:]]
        loss = -(chosen * torch.from_numpy(document.trained[1:])).sum()
        loss.backward()
        wanted += loss.item()
    with tiny.mesh(), jax.default_matmul_precision("highest"):
        params, c = hf.load(folder)
        batch = tiny.place(tiny.stack([packing.make_row(documents, 192)]))

        @jax.jit
        @jax.value_and_grad
        def step(params: decoder.Params) -> jax.Array:
            return loss_sum(params, batch, c, jnp.float32, "full", None)

        found, gradients = step(params)
    leaves = [np.asarray(leaf) for leaf in jax.tree.leaves(gradients)]
    ours = Stacked(decoder.template(c), lambda leaf, index: leaves[leaf][index])
    assert float(found) == pytest.approx(wanted, rel=1e-5)
    expected = tiny.of_each_expert({name: parameter.grad.numpy() for name, parameter in model.named_parameters()})
    tiny.assert_trees_close({name: ours[name] for name in expected}, expected, 1e-4)


def test_the_loss_that_balances_experts_is_that_of_transformers(tmp_path: Path):
    """Value and gradient of two documents in one row here, of two rows and a mask there; padding in both."""
    import torch

    values, c = tiny.hf_config("qwen3_moe", output_router_logits=True), tiny.config("qwen3_moe")
    folder = tiny.write_folder(tmp_path / "qwen3_moe", values, tiny.values(c), c, False)
    documents, model = tiny.documents(LENGTHS, vocab=96), theirs(folder)
    tokens, mask = (np.zeros((2, max(LENGTHS)), np.int64) for _ in range(2))
    for i, document in enumerate(documents):
        inputs = document.tokens[:-1]  # the last token is only ever a target
        tokens[i, : len(inputs)], mask[i, : len(inputs)] = inputs, 1
    wanted = model(torch.from_numpy(tokens), attention_mask=torch.from_numpy(mask)).aux_loss
    wanted.backward()
    with tiny.mesh(), jax.default_matmul_precision("highest"):
        params, _ = hf.load(folder)
        row = tiny.place(tiny.stack([packing.make_row(documents, 192)]))

        @jax.jit
        @jax.value_and_grad
        def uneven(params: decoder.Params) -> jax.Array:
            routed = decoder.hidden(params, row.tokens, row.positions, row.segments, c, jnp.float32)[1]
            return routing.balance_loss(routed, c)[0]

        found, gradients = uneven(params)
    assert float(found) == pytest.approx(wanted.item(), rel=1e-5)
    leaves = [np.asarray(leaf) for leaf in jax.tree.leaves(gradients)]
    ours = Stacked(decoder.template(c), lambda leaf, index: leaves[leaf][index])
    of_theirs = {name: p.grad.numpy() for name, p in model.named_parameters() if p.grad is not None}
    expected = tiny.of_each_expert(of_theirs)
    assert "model.layers.1.mlp.gate.weight" in expected
    shown = {name: value for name, value in expected.items() if np.abs(value).max() > 0}
    tiny.assert_trees_close({name: ours[name] for name in shown}, shown, 1e-4)


def test_sampled_tokens_are_the_likeliest_of_the_packed_forward(folder: Path):
    """And of transformers. Prompts end within, at and past the window, in pages that the window leaves behind."""
    import torch

    prompts = [tuple(document.tokens.tolist()) for document in tiny.documents((30, 48, 90), vocab=96)]
    with tiny.mesh(), jax.default_matmul_precision("highest"):
        params, c = hf.load(folder)
        config = EngineConfig(slots=2, page_tokens=16, prefill_tokens=32, compute_dtype="float32")
        engine = Engine(params, c, (), positions=128, config=config)
        settings = SamplingConfig(max_new_tokens=24)
        requests = [Request(str(i), prompt, settings) for i, prompt in enumerate(prompts)]
        outputs = {output.id: output.tokens for output in engine.generate(requests)}
        rows = np.zeros((3, 128), np.int32)
        for i, prompt in enumerate(prompts):
            rows[i, : len(prompt) + 24] = [*prompt, *outputs[str(i)]]
        logits = export_check.logits(params, rows, c)
    with torch.no_grad():
        of_transformers = theirs(folder)(torch.from_numpy(rows.astype(np.int64))).logits.numpy()
    for i, prompt in enumerate(prompts):
        here = slice(len(prompt) - 1, len(prompt) + 23)
        assert outputs[str(i)] == tuple(logits[i, here].argmax(-1).tolist())
        assert outputs[str(i)] == tuple(of_transformers[i, here].argmax(-1).tolist())
