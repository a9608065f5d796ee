"""`jaxdistill evaluate`: samples a task's problems from a model, grades them, and says how sure it is."""

import dataclasses
import hashlib
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import jax
from rich.console import Console
from rich.markup import escape
from rich.progress import TextColumn
from rich.table import Table

from jaxdistill import manifest, records, thinking
from jaxdistill.checkpoint import base_of, fingerprint
from jaxdistill.data import chat
from jaxdistill.errors import RunError, UserError
from jaxdistill.evaluate import tasks
from jaxdistill.evaluate.grade import Summary, grade, grader_named, summarize
from jaxdistill.progress import Progress
from jaxdistill.records import Completion, Problem
from jaxdistill.sample.engine import EngineConfig
from jaxdistill.sample.request import Output, Request, SamplingConfig
from jaxdistill.sample.run import engine_for
from jaxdistill.sharding import MeshConfig
from jaxdistill.verify import Verifier


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
    slots: int = 32  # requests decoded at once, rounded up to a multiple of the mesh's data x fsdp
    compute_dtype: Literal["bfloat16", "float32"] = "bfloat16"
    mesh: MeshConfig = MeshConfig()

    def __post_init__(self):
        if self.prompt is not None and "{problem}" not in self.prompt:
            raise UserError(f"prompt is {self.prompt!r}; expected a template with {{problem}}")
        if self.samples < 1 or self.slots < 1:
            raise UserError(f"samples is {self.samples} and slots {self.slots}; expected 1 or more")
        if self.samples > 1 and self.sampling.temperature == 0:
            raise UserError(
                f"samples is {self.samples} at temperature 0, where all samples of a problem are one; "
                "set sampling.temperature, or ask for one sample"
            )


@dataclasses.dataclass(frozen=True)
class _Plan:
    """What an evaluation is to sample, and how."""

    config: EvaluateConfig
    task: tasks.Task
    problems: list[Problem]
    weights: str  # fingerprint of the model

    def wanted(self) -> dict[str, tuple[Problem, int]]:
        """Problem and sample index by completion id."""
        return {f"{self.task.name}/{p.id}/{i}": (p, i) for p in self.problems for i in range(self.config.samples)}

    def settings(self, problem: Problem) -> dict[str, Any]:
        """What a completion's text and grade depend on, apart from its seed."""
        content = json.dumps([problem.problem, problem.answer])
        return {
            **dataclasses.asdict(self.config.sampling),
            "compute_dtype": self.config.compute_dtype,
            "model": str(self.config.model),
            "weights": self.weights,
            "prompt": self.task.prompt,
            "problem": hashlib.sha256(content.encode()).hexdigest()[:16],
        }

    def seed(self, id_: str) -> int:
        """A seed of each sample's own, 31 bits."""
        return int.from_bytes(hashlib.sha256(f"{self.config.seed}/{id_}".encode()).digest()[:4], "big") >> 1

    def changes(self, earlier: Completion, item: tuple[Problem, int] | None) -> set[str]:
        """Which of model, settings and problems a completion of an earlier call does not share.

        Args:
          item: what is wanted under its id, if anything.
        """
        if item is None:
            return {"settings" if earlier.sample_index >= self.config.samples else "problems"}
        now, then = self.settings(item[0]), earlier.settings
        differ = {key for key in now.keys() | then.keys() if now.get(key) != then.get(key)}
        found = {_PART_OF_SETTING.get(key, "settings") for key in differ}
        return found if earlier.seed == self.seed(earlier.id) else found | {"settings"}


_PART_OF_SETTING = {"model": "model", "weights": "model", "problem": "problems"}  # all others: settings


def main(config: EvaluateConfig) -> Summary:
    """Samples what is missing, grades everything, prints and writes the summary.

    Completions are committed one by one: a run that was killed goes on where it stopped.
    """
    workdir, task = config.workdir, tasks.task(config.task)
    if config.prompt is not None:
        task = dataclasses.replace(task, prompt=config.prompt)
    grader_named(task.grader)  # refused before hours of sampling, not after
    problems = tasks.select(task.problems_from(config.path), config.limit, config.limit_seed)
    plan = _Plan(config, task, problems, fingerprint(config.model))
    completions = _complete(plan)
    with Verifier() as verifier:
        scores = grade(completions, {p.id: p.answer or "" for p in problems}, verifier, task.grader)
        summary = summarize(completions, scores, verifier)
    records.write_jsonl(workdir / "scores.jsonl", scores)
    manifest.write_json(workdir / "summary.json", dataclasses.asdict(summary))
    counts = {"problems": len(problems), "completions": len(completions)}
    inputs = [config.path, base_of(config.model) / "config.json"]
    about = {name: getattr(task, name) for name in ("prompt", "grader", "metric", "licence", "why", "source")}
    manifest.write_manifest(workdir, "evaluate", inputs, counts, model=plan.weights, task={"name": task.name, **about})
    Console(stderr=True).print(table(escape(f"{config.model} on {config.task}"), summary))
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


def _complete(plan: _Plan) -> list[Completion]:
    """All completions, of earlier calls and of this one, in the order of the problems."""
    path = plan.config.workdir / "completions.jsonl"
    wanted = plan.wanted()
    done = {c.id: c for c in _earlier(path)}
    changes = {id_: found for id_, completion in done.items() if (found := plan.changes(completion, wanted.get(id_)))}
    if changes:
        raise UserError(
            f"{path} holds completions of an earlier call, since when there were changes to: "
            f"{', '.join(sorted(set().union(*changes.values())))} (for example {next(iter(changes))}); "
            "use another workdir, or remove the file"
        )
    manifest.write_config(plan.config.workdir, plan.config)
    left = {id_: item for id_, item in wanted.items() if id_ not in done}
    if left:
        with path.open("a", encoding="utf-8") as lines:
            for completion in _sample(plan, left):
                lines.write(records.to_json(completion) + "\n")
                lines.flush()
                done[completion.id] = completion
    return [done[id_] for id_ in wanted]


def _earlier(path: Path) -> list[Completion]:
    """Completions that were committed before; a last line that a kill cut off is removed from the file."""
    if not path.is_file():
        return []
    content = path.read_bytes()
    whole = content.rfind(b"\n") + 1
    if whole < len(content):
        os.truncate(path, whole)
    return list(records.read_jsonl(path, Completion))


def _sample(plan: _Plan, left: dict[str, tuple[Problem, int]]) -> Iterator[Completion]:
    config = plan.config
    tokenizer = chat.load_tokenizer(base_of(config.model))

    def prompt(problem: Problem) -> tuple[int, ...]:
        return tuple(chat.prompt_tokens(tokenizer, [{"role": "user", "content": plan.task.ask(problem)}]))

    requests = [Request(id_, prompt(problem), config.sampling, plan.seed(id_)) for id_, (problem, _) in left.items()]
    console = Console(stderr=True)
    columns = (*Progress.get_default_columns(), TextColumn("{task.fields[speed]}"))
    with jax.set_mesh(config.mesh.build()), Progress(*columns, console=console) as progress:
        how = EngineConfig(slots=config.slots, compute_dtype=config.compute_dtype)
        engine = engine_for(config.model, tokenizer, requests, how)
        if fingerprint(config.model) != plan.weights:
            raise RunError(f"{config.model} was written to while it was read; evaluate it again when it is finished")
        bar = progress.add_task(f"sample {config.task}", total=len(requests), speed="")
        tokens, start = 0, time.monotonic()
        for output in engine.generate(requests):
            tokens += len(output.tokens)
            speed = f"{tokens / (time.monotonic() - start):,.0f} tokens/s"  # of finished samples, compilation included
            progress.update(bar, advance=1, speed=speed)
            problem, index = left[output.id]
            yield _completion(plan, output, problem, index, tokenizer)
        wall_s = time.monotonic() - start
    console.print(f"{len(requests)} samples, {tokens:,} tokens in {wall_s:,.1f} s: {tokens / wall_s:,.0f} tokens/s")


def _completion(plan: _Plan, output: Output, problem: Problem, index: int, tokenizer: Any) -> Completion:
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


def read_completions(workdir: Path) -> list[tuple[Completion, records.Score]]:
    """Completions of a finished evaluation with their scores."""
    scores = {s.completion_id: s for s in records.read_jsonl(workdir / "scores.jsonl", records.Score)}
    return [(c, scores[c.id]) for c in records.read_jsonl(workdir / "completions.jsonl", Completion)]
