"""`jaxdistill sample`: prompts -> text, from a checkpoint or a Hugging Face folder."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp

from jaxdistill import manifest
from jaxdistill.checkpoint import base_of, load_model
from jaxdistill.data import chat
from jaxdistill.errors import UserError
from jaxdistill.models.quantized import MatmulDtype
from jaxdistill.sample.cache import CacheDtype
from jaxdistill.sample.engine import Engine, EngineConfig
from jaxdistill.sample.request import Request, SamplingConfig
from jaxdistill.sharding import MeshConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class SampleConfig:
    """Prompts to answer."""

    workdir: Path  # run folder: samples.json
    model: Path  # Hugging Face folder, or a phase folder of a training run
    prompts: tuple[str, ...]  # what the user says, one conversation each
    sampling: SamplingConfig = SamplingConfig()
    seed: int = 0  # of the first prompt; each further one has the next
    slots: int = 8  # requests decoded at once, rounded up to a multiple of the mesh's data x fsdp
    compute_dtype: Literal["bfloat16", "float32"] = "bfloat16"
    weight_dtype: MatmulDtype = "compute"  # that the layers' matrices are stored in
    cache_dtype: CacheDtype = "compute"  # that keys and values are stored in
    mesh: MeshConfig = MeshConfig()

    def __post_init__(self):
        if not self.prompts:
            raise UserError("there are no prompts; expected --prompts 'one question' 'another'")
        if self.slots < 1:
            raise UserError(f"slots is {self.slots}; expected 1 or more")


def main(config: SampleConfig) -> list[dict[str, str | int]]:
    """Answers the prompts, writes the answers to samples.json and prints them."""
    model, workdir = config.model, config.workdir
    tokenizer = chat.load_tokenizer(base_of(model))
    conversations = [chat.prompt_tokens(tokenizer, [{"role": "user", "content": text}]) for text in config.prompts]
    requests = [
        Request(str(i), tuple(tokens), config.sampling, config.seed + i) for i, tokens in enumerate(conversations)
    ]
    with jax.set_mesh(config.mesh.build()):
        how = EngineConfig(
            slots=config.slots,
            compute_dtype=config.compute_dtype,
            weight_dtype=config.weight_dtype,
            cache_dtype=config.cache_dtype,
        )
        engine = engine_for(model, tokenizer, requests, how)
        outputs = {output.id: output for output in engine.generate(requests)}
    rows = []
    for i, prompt in enumerate(config.prompts):
        output = outputs[str(i)]
        text = tokenizer.decode(output.tokens)
        rows.append(
            {"prompt": prompt, "text": text, "tokens": len(output.tokens), "finish_reason": output.finish_reason}
        )
    manifest.write_config(workdir, config)
    manifest.write_json(workdir / "samples.json", rows)
    manifest.write_manifest(workdir, "sample", [base_of(model) / "config.json"], {"prompts": len(rows)})
    for i, row in enumerate(rows):  # not through rich: it would take [/INST] for a style
        print(f"{i} ({row['tokens']} tokens, {row['finish_reason']})\n{row['text']}")
    return rows


def engine_for(model: Path, tokenizer: Any, requests: Sequence[Request], config: EngineConfig) -> Engine:
    """An engine on the current mesh with a model's weights, and room for each of these requests."""
    positions = max(len(request.prompt) + request.sampling.max_new_tokens for request in requests)
    return load_engine(model, tokenizer, positions, config)


def load_engine(model: Path, tokenizer: Any, positions: int | None, config: EngineConfig) -> Engine:
    """An engine on the current mesh with a model's weights.

    Args:
      positions: longest prompt and output together; by default all the model was made for.
    """
    params, c = load_model(model, dtype=jnp.dtype(config.compute_dtype))  # no float32 copy beside the one that samples
    stops = chat.end_tokens(tokenizer, base_of(model))
    return Engine(params, c, stops, c.max_positions if positions is None else positions, config)
