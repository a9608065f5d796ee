"""Completions from a model's weights, by the project's own engine."""

import time
from collections.abc import Iterator, Sequence
from typing import Any

import jax
from rich.console import Console
from rich.progress import TextColumn

from jaxdistill import thinking
from jaxdistill.checkpoint import base_of, fingerprint
from jaxdistill.data import chat
from jaxdistill.errors import RunError
from jaxdistill.evaluate import budget
from jaxdistill.evaluate.plan import Plan, Wanted
from jaxdistill.progress import Progress
from jaxdistill.records import Completion, Problem
from jaxdistill.sample.engine import Engine, EngineConfig
from jaxdistill.sample.request import Output, Request
from jaxdistill.sample.run import engine_for


def sample(plan: Plan, left: Wanted) -> Iterator[Completion]:
    """Completions as they are finished."""
    config, model = plan.config, plan.model
    assert model is not None
    tokenizer = chat.load_tokenizer(base_of(model))
    with jax.set_mesh(config.mesh.build()):
        how = EngineConfig(
            slots=config.slots,
            compute_dtype=config.compute_dtype,
            weight_dtype=config.weight_dtype,
            cache_dtype=config.cache_dtype,
        )
        asked = requests(plan, left, tokenizer)
        engine = engine_for(model, tokenizer, asked, how)
        if fingerprint(model) != plan.weights:
            raise RunError(f"{model} was written to while it was read; evaluate it again when it is finished")
        yield from draw(engine, tokenizer, plan, left, asked)


def requests(plan: Plan, left: Wanted, tokenizer: Any) -> list[Request]:
    """What the engine is asked."""
    sampling = plan.config.sampling
    return [
        Request(id_, tuple(chat.prompt_tokens(tokenizer, plan.messages(problem))), sampling, plan.seed(id_))
        for id_, (problem, _) in left.items()
    ]


def draw(engine: Engine, tokenizer: Any, plan: Plan, left: Wanted, asked: Sequence[Request]) -> Iterator[Completion]:
    """Completions from an engine on the current mesh, with a bar of how far they are.

    Args:
      asked: `requests` of the same plan.
    """
    console = Console(stderr=True)
    columns = (*Progress.get_default_columns(), TextColumn("{task.fields[speed]}"))
    with Progress(*columns, console=console) as progress:
        bar = progress.add_task(f"sample {plan.name}", total=len(asked), speed="")
        tokens, start = 0, time.monotonic()
        for output in budget.generate(engine, asked, plan.budget, tokenizer):
            tokens += len(output.tokens)
            speed = f"{tokens / (time.monotonic() - start):,.0f} tokens/s"  # of finished samples, compilation included
            progress.update(bar, advance=1, speed=speed)
            problem, index = left[output.id]
            yield _completion(plan, output, problem, index, tokenizer)
        wall_s = time.monotonic() - start
    console.print(f"{len(asked)} samples, {tokens:,} tokens in {wall_s:,.1f} s: {tokens / wall_s:,.0f} tokens/s")


def _completion(plan: Plan, output: Output, problem: Problem, index: int, tokenizer: Any) -> Completion:
    text = tokenizer.decode(output.tokens, skip_special_tokens=True)
    thought = _thinking_tokens(text, len(output.tokens), tokenizer)
    return Completion(
        id=output.id,
        task=plan.task.name,
        item_id=problem.id,
        sample_index=index,
        seed=plan.seed(output.id),
        settings=plan.settings(problem),
        text=text,
        thinking_tokens=thought,
        answer_tokens=len(output.tokens) - thought,
        finish_reason=output.finish_reason,
    )


def _thinking_tokens(text: str, tokens: int, tokenizer: Any) -> int:
    """Tokens up to the end of the thinking part; all of them if it never ends, none if there is none."""
    thought, mark, _ = text.rpartition(thinking.CLOSE)
    if mark:
        return min(tokens, len(tokenizer(thought + mark, add_special_tokens=False)["input_ids"]))
    return tokens if thinking.OPEN in text else 0
