"""Tokens per second of the sampler and of `transformers.generate` on the same requests, greedy, in one run.

    .venv/bin/python benchmarks/sampling.py [--requests 128] [--at-once 32] [--mean-tokens 256] [--dtype float32]

SmolLM2-135M-Instruct; prompts of 20 to 120 tokens, output lengths lognormal (sigma 1), no end token, so that both say
exactly as many tokens as were drawn. transformers takes the requests in batches of --at-once, in their order, and each
batch runs until its longest output ends: what others say past their own length is not counted. Ours keeps --at-once
slots full. Both compile or warm up on a few requests first. ratio = (our output tokens / our seconds) / (their output
tokens / their seconds), the same output tokens.
"""

import argparse
import os
import time
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import numpy as np
import smollm2

from jaxdistill import hf
from jaxdistill.sample.engine import Engine, EngineConfig
from jaxdistill.sample.request import Request, SamplingConfig
from jaxdistill.sharding import MeshConfig

POSITIONS = 2048


def requests(count: int, mean_tokens: int, vocab: int) -> list[Request]:
    """Random prompts, and how many tokens each is to say."""
    random = np.random.default_rng(0)
    lengths = np.exp(random.normal(np.log(mean_tokens) - 0.5, 1.0, count)).clip(8, POSITIONS - 128).astype(int)
    prompts = [random.integers(3, vocab, random.integers(20, 120)).tolist() for _ in range(count)]
    return [
        Request(str(i), tuple(prompt), SamplingConfig(max_new_tokens=int(length)))
        for i, (prompt, length) in enumerate(zip(prompts, lengths, strict=True))
    ]


def ours(engine: Engine, asked: list[Request]) -> float:
    """Seconds."""
    started = time.perf_counter()
    said = sum(len(output.tokens) for output in engine.generate(asked))
    assert said == sum(request.sampling.max_new_tokens for request in asked)
    return time.perf_counter() - started


def theirs(model: Any, asked: list[Request], at_once: int) -> float:
    """Seconds."""
    import torch

    started = time.perf_counter()
    for first in range(0, len(asked), at_once):
        batch = asked[first : first + at_once]
        width = max(len(request.prompt) for request in batch)
        ids = torch.tensor([[2] * (width - len(r.prompt)) + list(r.prompt) for r in batch])
        mask = torch.tensor([[0] * (width - len(r.prompt)) + [1] * len(r.prompt) for r in batch])
        longest = max(request.sampling.max_new_tokens for request in batch)
        with torch.no_grad():
            settings = {"max_new_tokens": longest, "do_sample": False, "eos_token_id": None, "pad_token_id": 2}
            model.generate(ids, attention_mask=mask, **settings)
    return time.perf_counter() - started


def main() -> None:
    """Measures both and prints the ratio."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--requests", type=int, default=128)
    parser.add_argument("--at-once", type=int, default=32)
    parser.add_argument("--mean-tokens", type=int, default=256)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"], help="ours")
    parser.add_argument("--peer-dtype", default="float32", choices=["float32", "bfloat16"], help="of transformers")
    arguments = parser.parse_args()
    import torch
    import transformers

    folder = smollm2.folder()
    with jax.set_mesh(MeshConfig().build()):
        params, c = hf.load(folder)
        how = EngineConfig(slots=arguments.at_once, compute_dtype=arguments.dtype, prefill_tokens=64)
        engine = Engine(params, c, (), POSITIONS, how)
        del params
        asked = requests(arguments.requests, arguments.mean_tokens, c.vocab)
        tokens = sum(request.sampling.max_new_tokens for request in asked)
        warm_s = ours(engine, requests(2, 16, c.vocab))
        seconds = ours(engine, asked)
    print(f"ours {arguments.dtype}: {tokens} tokens in {seconds:.1f} s: {tokens / seconds:.1f} tokens/s", end=" ")
    print(f"({warm_s:.0f} s for the first two requests, compilation included)", flush=True)
    dtype = getattr(torch, arguments.peer_dtype)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
    theirs(model, requests(2, 16, c.vocab), 2)
    peer_s = theirs(model, asked, arguments.at_once)
    print(f"transformers {arguments.peer_dtype}: {tokens} tokens in {peer_s:.1f} s: {tokens / peer_s:.1f} tokens/s")
    print(f"ratio {peer_s / seconds:.2f} = ({tokens} / {seconds:.1f}) / ({tokens} / {peer_s:.1f})")


if __name__ == "__main__":
    main()
