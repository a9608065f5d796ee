"""The real SmolLM2-135M weights against transformers: logits at 4,096 positions, and 256 greedy tokens."""

import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from jaxdistill import hf, sharding
from jaxdistill.data import chat
from jaxdistill.models import decoder
from jaxdistill.sample.engine import Engine, EngineConfig
from jaxdistill.sample.request import Request, SamplingConfig

POSITIONS, CHUNK = 4096, 512
NEW_TOKENS = 256
LEAST_COMPARED = 64  # tokens, should two logits come too close after that


@pytest.fixture(scope="module")
def theirs(smollm2: Path) -> Any:
    """The model in transformers, float32."""
    import torch
    import transformers

    return transformers.AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32).eval()


@pytest.fixture
def _one_torch_thread() -> Iterator[None]:
    """Two threads wait for each other at every small product: 5 times slower than one where the cores are shared."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def tokenizer(smollm2: Path) -> Any:
    return chat.load_tokenizer(smollm2)


def test_logits_at_4096_positions(smollm2: Path, theirs: Any, tokenizer: Any):
    import torch

    text = 2 * (Path(__file__).parents[2] / "LICENSE").read_text(encoding="utf-8")  # a text that never changes
    tokens = np.array(tokenizer(text)["input_ids"][:POSITIONS], np.int32)[None]
    assert tokens.shape == (1, POSITIONS)
    with torch.no_grad():
        hidden = theirs.model(torch.from_numpy(tokens.astype(np.int64))).last_hidden_state
    with tiny.mesh(), jax.default_matmul_precision("highest"):
        params, c = hf.load(smollm2)
        rows = [sharding.put(x, "BT") for x in (tokens, np.arange(POSITIONS)[None], np.ones_like(tokens))]
        x, _ = jax.jit(lambda p, *rows: decoder.hidden(p, *rows, c=c, dtype=jnp.float32))(params, *rows)
        logits = jax.jit(functools.partial(decoder.logits, c=c))
        largest = worst = 0.0
        compared = close = 0
        for at in range(0, POSITIONS, CHUNK):  # 4,096 x 49,152 logits are 0.8 GB: a chunk of rows at a time
            with torch.no_grad():
                expected = theirs.lm_head(hidden[0, at : at + CHUNK])
            found = torch.from_numpy(np.array(logits(params, x[:, at : at + CHUNK])[0]))
            largest = max(largest, float(expected.abs().max()))
            worst = max(worst, float((found - expected).abs().max()))
            off = (torch.log_softmax(found, -1) - torch.log_softmax(expected, -1)).abs()
            assert float(off.max()) < 1e-3
            compared, close = compared + off.numel(), close + int((off < 1e-5).sum())
    assert worst < 1e-4 * largest
    assert close > compared / 2  # the median over all positions is under 1e-5


@pytest.mark.usefixtures("_one_torch_thread")
def test_greedy_tokens(smollm2: Path, theirs: Any, tokenizer: Any, capsys: pytest.CaptureFixture[str]):
    import torch

    question = "Natalia sold 48 clips in April and half as many in May. How many did she sell altogether?"
    prompt = chat.prompt_tokens(tokenizer, [{"role": "user", "content": question}])
    with torch.no_grad():
        # No end token: both go on for all of the 256 tokens
        settings = {"max_new_tokens": NEW_TOKENS, "do_sample": False, "eos_token_id": None, "pad_token_id": 2}
        inputs = torch.tensor([prompt])
        out = theirs.generate(
            inputs,
            attention_mask=torch.ones_like(inputs),
            output_logits=True,
            return_dict_in_generate=True,
            **settings,
        )
    expected = out.sequences[0, len(prompt) :].tolist()
    assert len(expected) == NEW_TOKENS
    with tiny.mesh(), jax.default_matmul_precision("highest"):
        params, c = hf.load(smollm2)
        engine = Engine(params, c, (), positions=512, config=EngineConfig(slots=2, compute_dtype="float32"))
        (output,) = engine.generate([Request("r", tuple(prompt), SamplingConfig(max_new_tokens=NEW_TOKENS))])
    assert output.finish_reason == "length"
    for step, (ours, logits) in enumerate(zip(output.tokens, out.logits, strict=True)):
        best, second = logits[0].topk(2).values.tolist()
        if best - second < 1e-4:
            with capsys.disabled():
                print(f"\nstopped at token {step}: the two best logits are {best - second:.2g} apart, either is right")
            assert step >= LEAST_COMPARED
            return
        assert ours == expected[step], f"token {step} differs, where the two best logits are {best - second:.3g} apart"
