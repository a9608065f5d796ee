"""`jaxdistill sample`: prompts -> text, from a checkpoint or a Hugging Face folder."""

import dataclasses
from pathlib import Path
from typing import Literal

import jax
import jax.numpy as jnp
from rich.console import Console

from jaxdistill import manifest
from jaxdistill.checkpoint import base_of, load_model
from jaxdistill.data import chat
from jaxdistill.errors import UserError
from jaxdistill.sample.choose import SamplingConfig
from jaxdistill.sample.engine import Engine, Request
from jaxdistill.sharding import MeshConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class SampleConfig:
    """Prompts to answer."""

    workdir: Path  # run folder: samples.json
    model: Path  # Hugging Face folder, or a phase folder of a training run
    prompts: tuple[str, ...]  # what the user says, one conversation each
    sampling: SamplingConfig = SamplingConfig()
    seed: int = 0  # of the first prompt; each further one has the next
    slots: int = 8  # requests decoded at once
    compute_dtype: Literal["bfloat16", "float32"] = "bfloat16"
    mesh: MeshConfig = MeshConfig()

    def __post_init__(self):
        if not self.prompts:
            raise UserError("there are no prompts; expected --prompts 'one question' 'another'")


def main(config: SampleConfig) -> list[dict[str, str | int]]:
    """Answers the prompts, prints the answers and writes them to samples.json."""
    model, workdir = config.model, config.workdir
    tokenizer = chat.load_tokenizer(base_of(model))
    conversations = [chat.prompt_tokens(tokenizer, [{"role": "user", "content": text}]) for text in config.prompts]
    requests = [Request(str(i), tuple(tokens), config.seed + i) for i, tokens in enumerate(conversations)]
    positions = max(len(tokens) for tokens in conversations) + config.sampling.max_new_tokens
    with jax.set_mesh(config.mesh.build()):
        params, c = load_model(model)
        engine = Engine(
            params,
            c,
            config.sampling,
            chat.end_tokens(tokenizer),
            slots=config.slots,
            positions=positions,
            dtype=jnp.dtype(config.compute_dtype),
        )
        outputs = {output.id: output for output in engine.generate(requests)}
    rows = []
    for i, prompt in enumerate(config.prompts):
        output = outputs[str(i)]
        text = tokenizer.decode(output.tokens)
        rows.append(
            {"prompt": prompt, "text": text, "tokens": len(output.tokens), "finish_reason": output.finish_reason}
        )
        Console().print(f"[bold]{i}[/bold] ({len(output.tokens)} tokens, {output.finish_reason})", text, sep="\n")
    manifest.write_config(workdir, config)
    manifest.write_json(workdir / "samples.json", rows)
    manifest.write_manifest(workdir, "sample", [base_of(model) / "config.json"], {"prompts": len(rows)})
    return rows
