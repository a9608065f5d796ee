"""`jaxdistill evaluate`: samples a task's problems from a model, grades them, and says how sure it is."""

import dataclasses
import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from jaxdistill import manifest, records
from jaxdistill.checkpoint import base_of, load_model
from jaxdistill.data import chat
from jaxdistill.errors import UserError
from jaxdistill.evaluate import tasks
from jaxdistill.evaluate.grade import Summary, grade, summarize
from jaxdistill.records import Completion, Problem
from jaxdistill.sample.choose import SamplingConfig
from jaxdistill.sample.engine import Engine, Output, Request
from jaxdistill.sharding import MeshConfig
from jaxdistill.verify import Verifier

_THINKING_ENDS = "</think>"


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """One model on one task under one sampling setting."""

    workdir: Path  # run folder; run again with the same one to resume
    model: Path  # Hugging Face folder, or a phase folder of a training run
    task: str  # name of a file in evaluate/tasks/
    path: Path  # the task's problems, a JSON Lines file
    limit: int | None = None  # problems, a fixed random choice; all by default
    limit_seed: int = 0  # of that choice
    prompt: str | None = None  # template with {problem}; the task's own by default
    samples: int = 1  # per problem
    seed: int = 0  # of the sampling; a request's own seed also depends on problem and sample
    sampling: SamplingConfig = SamplingConfig()
    slots: int = 32  # requests decoded at once
    compute_dtype: Literal["bfloat16", "float32"] = "bfloat16"
    mesh: MeshConfig = MeshConfig()

    def __post_init__(self):
        if self.prompt is not None and "{problem}" not in self.prompt:
            raise UserError(f"prompt is {self.prompt!r}; expected a template with {{problem}}")
        if self.samples < 1 or self.slots < 1:
            raise UserError(f"samples is {self.samples} and slots {self.slots}; expected 1 or more")

    def settings(self) -> dict[str, Any]:
        """What a completion's text depends on, apart from problem and seed."""
        return {
            **dataclasses.asdict(self.sampling),
            "compute_dtype": self.compute_dtype,
            "model": str(self.model),
            "prompt": self.prompt,
        }


def main(config: EvaluateConfig) -> Summary:
    """Samples what is missing, grades everything, prints and writes the summary.

    Completions are committed one by one: a run that was killed goes on where it stopped.
    """
    workdir, task = config.workdir, tasks.task(config.task)
    if config.prompt is not None:
        task = dataclasses.replace(task, prompt=config.prompt)
    problems = tasks.select(task.problems_from(config.path), config.limit, config.limit_seed)
    manifest.write_config(workdir, config)
    completions = _complete(config, task, problems)
    with Verifier() as verifier:
        scores = grade(completions, {p.id: p.answer or "" for p in problems}, verifier)
        summary = summarize(completions, scores, verifier)
    records.write_jsonl(workdir / "scores.jsonl", scores)
    manifest.write_json(workdir / "summary.json", dataclasses.asdict(summary))
    counts = {"problems": len(problems), "completions": len(completions)}
    manifest.write_manifest(workdir, "evaluate", [config.path, base_of(config.model) / "config.json"], counts)
    Console(stderr=True).print(table(f"{config.model} on {config.task}", summary))
    return summary


def table(title: str, summary: Summary) -> Table:
    """The summary as a table for a person."""
    shown = Table(title=title)
    shown.add_column("measure")
    shown.add_column("value", justify="right")
    n = max(summary.pass_at)
    for name, value in {
        f"avg@{n}": str(summary.accuracy),
        **{f"pass@{k}": str(estimate) for k, estimate in summary.pass_at.items() if k > 1},
        **{f"maj@{k}": str(estimate) for k, estimate in summary.maj_at.items() if k > 1},
        "average tokens": f"{summary.tokens.average:,.0f}",
        "truncated": f"{summary.truncation_rate:.1%}",
        "no answer": f"{summary.no_answer_rate:.1%}",
    }.items():
        shown.add_row(name, value)
    return shown


def _complete(config: EvaluateConfig, task: tasks.Task, problems: list[Problem]) -> list[Completion]:
    """All completions, of earlier calls and of this one, in the order of the problems."""
    path = config.workdir / "completions.jsonl"
    wanted = {f"{config.task}/{p.id}/{i}": (p, i) for p in problems for i in range(config.samples)}
    done = {c.id: c for c in _earlier(path)}
    changed = [c.id for c in done.values() if c.settings != config.settings() or c.seed != _seed(config, c.id)]
    if changed or done.keys() - wanted.keys():
        raise UserError(
            f"{path} holds completions of other problems or settings (for example "
            f"{(changed or sorted(done.keys() - wanted.keys()))[0]}); use another workdir, or remove the file"
        )
    left = {id_: item for id_, item in wanted.items() if id_ not in done}
    if left:
        with path.open("a", encoding="utf-8") as lines:
            for completion in _sample(config, task, left):
                lines.write(records.to_json(completion) + "\n")
                lines.flush()
                done[completion.id] = completion
    return [done[id_] for id_ in wanted]


def _earlier(path: Path) -> list[Completion]:
    """Completions that were committed before; a last line that a kill cut off is removed from the file."""
    if not path.is_file():
        return []
    text = path.read_text(encoding="utf-8")
    whole = text[: text.rfind("\n") + 1]
    if whole != text:
        path.write_text(whole, encoding="utf-8")
    return list(records.read_jsonl(path, Completion))


def _seed(config: EvaluateConfig, id_: str) -> int:
    """A seed of each sample's own, 31 bits."""
    return int.from_bytes(hashlib.sha256(f"{config.seed}/{id_}".encode()).digest()[:4], "big") >> 1


def _sample(config: EvaluateConfig, task: tasks.Task, left: dict[str, tuple[Problem, int]]) -> Iterator[Completion]:
    tokenizer = chat.load_tokenizer(base_of(config.model))

    def prompt(problem: Problem) -> tuple[int, ...]:
        return tuple(chat.prompt_tokens(tokenizer, [{"role": "user", "content": task.ask(problem)}]))

    requests = [Request(id_, prompt(problem), _seed(config, id_)) for id_, (problem, _) in left.items()]
    positions = max(len(request.prompt) for request in requests) + config.sampling.max_new_tokens
    with jax.set_mesh(config.mesh.build()), Progress(console=Console(stderr=True)) as bar:
        params, c = load_model(config.model)
        engine = Engine(
            params,
            c,
            config.sampling,
            chat.end_tokens(tokenizer),
            slots=config.slots,
            positions=positions,
            dtype=jnp.dtype(config.compute_dtype),
        )
        for output in bar.track(engine.generate(requests), total=len(requests), description=f"sample {config.task}"):
            problem, index = left[output.id]
            yield _completion(config, output, problem, index, tokenizer)


def _completion(config: EvaluateConfig, output: Output, problem: Problem, index: int, tokenizer: Any) -> Completion:
    text = tokenizer.decode(output.tokens, skip_special_tokens=True)
    thinking = _thinking_tokens(text, len(output.tokens), tokenizer)
    return Completion(
        id=output.id,
        task=config.task,
        item_id=problem.id,
        sample_index=index,
        seed=_seed(config, output.id),
        settings=config.settings(),
        text=text,
        thinking_tokens=thinking,
        answer_tokens=len(output.tokens) - thinking,
        finish_reason=output.finish_reason,
    )


def _thinking_tokens(text: str, tokens: int, tokenizer: Any) -> int:
    """Tokens up to the end of the thinking part; all of them if it never ends, none if there is none."""
    thought, mark, _ = text.rpartition(_THINKING_ENDS)
    if mark:
        return min(tokens, len(tokenizer(thought + mark, add_special_tokens=False)["input_ids"]))
    return tokens if text.lstrip().startswith("<think>") else 0


def read_completions(workdir: Path) -> list[tuple[Completion, records.Score]]:
    """Completions of a finished evaluation with their scores."""
    scores = {s.completion_id: s for s in records.read_jsonl(workdir / "scores.jsonl", records.Score)}
    return [(c, scores[c.id]) for c in records.read_jsonl(workdir / "completions.jsonl", Completion)]
