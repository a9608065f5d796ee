"""What one model is to say in an evaluation, under which ids and seeds, and what of it is there already."""

import dataclasses
import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from jaxdistill import records
from jaxdistill.checkpoint import fingerprint
from jaxdistill.collect.teacher import Teacher, TeacherConfig
from jaxdistill.errors import UserError
from jaxdistill.evaluate import hub, tasks
from jaxdistill.evaluate.budget import Budget
from jaxdistill.evaluate.config import EvaluateConfig
from jaxdistill.evaluate.grade import grader_named
from jaxdistill.evaluate.tasks import Task
from jaxdistill.records import Completion, Message, Problem
from jaxdistill.sample.request import derived_seed

Wanted = dict[str, tuple[Problem, int]]  # problem and sample index by completion id


@dataclasses.dataclass(frozen=True)
class Plan:
    """What one model is to say, and how; an evaluation has one of these for each row of its table."""

    config: EvaluateConfig
    task: Task
    problems: Sequence[Problem]
    name: str  # also of its folder, where there are several
    folder: Path  # completions.jsonl, scores.jsonl, summary.json, manifest.json
    model: Path | None  # None: the endpoint
    weights: str  # fingerprint of the model; name and address of the endpoint
    source: str  # name of the model or endpoint
    budget: Budget = Budget()
    share: float = 1.0  # of all problems, where these are a shard's

    def config_alone(self) -> EvaluateConfig:
        """The configuration of an evaluation of this alone, in its folder."""
        if self.model is None:
            return dataclasses.replace(self.config, model=())
        limit, waits = self.budget.thinking_tokens, self.budget.waits
        forced = {"thinking_limits": () if limit is None else (limit,), "waits": (waits,) if waits else ()}
        return dataclasses.replace(self.config, model=(self.model,), endpoint=TeacherConfig(), **forced)

    def id(self, problem: Problem, sample_index: int) -> str:
        """Of a completion."""
        return f"{self.task.name}/{problem.id}/{sample_index}"

    def wanted(self) -> Wanted:
        """All that is to be sampled."""
        return {self.id(p, i): (p, i) for p in self.problems for i in range(self.config.samples)}

    def messages(self, problem: Problem) -> tuple[Message, ...]:
        """What is asked."""
        return ({"role": "user", "content": self.task.ask(problem)},)

    def settings(self, problem: Problem) -> dict[str, Any]:
        """What a completion's text and grade depend on, apart from its seed."""
        content = json.dumps([problem.problem, problem.answer])
        return {
            **(self._of_endpoint() if self.model is None else self._of_engine()),
            "weights": self.weights,
            "prompt": self.task.prompt,
            "problem": hashlib.sha256(content.encode()).hexdigest()[:16],
        }

    def _of_engine(self) -> dict[str, Any]:
        sampling = dataclasses.asdict(self.config.sampling)
        of_model = {"compute_dtype": self.config.compute_dtype, "model": str(self.model)}
        for name in ("weight_dtype", "cache_dtype"):
            if (value := getattr(self.config, name)) != "compute":
                of_model[name] = value
        return {**sampling, **of_model, **self.budget.settings()}

    def _of_endpoint(self) -> dict[str, Any]:
        request = Teacher(self.config.endpoint).request(())
        return {**request.parameters, "model": request.model, "seed_sent": self.config.endpoint_seeds}

    def seed(self, id_: str) -> int:
        """A seed of each sample's own, 31 bits; the same for every model."""
        return derived_seed(self.config.seed, id_)

    def merged(self) -> list[Path]:
        """Folders of this model in the shards to be merged."""
        return [shard / self.folder.relative_to(self.config.workdir) for shard in self.config.merge]

    def earlier(self) -> dict[str, Completion]:
        """Completions that earlier calls or shards committed, by id; those of shards are copied into the own file.

        A last line that a kill cut off is removed from the own file.

        Raises:
          UserError: some were made by another model, with other settings, or of other problems; or two shards differ.
        """
        path = self.folder / "completions.jsonl"
        done = self._checked(path, _committed(path))
        adopted: dict[str, Completion] = {}
        for folder in self.merged():
            theirs = folder / "completions.jsonl"
            for id_, one in self._checked(theirs, records.read_jsonl(theirs, Completion)).items():
                if adopted.setdefault(id_, one) != one:
                    raise UserError(
                        f"{theirs} holds another completion {id_} than a shard before it; merge one of them"
                    )
        new = [one for id_, one in adopted.items() if id_ not in done]
        if new:
            self.folder.mkdir(parents=True, exist_ok=True)
            with path.open("a", encoding="utf-8") as lines:
                lines.writelines(records.to_json(one) + "\n" for one in new)
        return {**done, **{one.id: one for one in new}}

    def _checked(self, path: Path, found: Iterable[Completion]) -> dict[str, Completion]:
        """By id, if they are of this plan."""
        wanted, done = self.wanted(), {c.id: c for c in found}
        changes = {id_: parts for id_, one in done.items() if (parts := self._changes(one, wanted.get(id_)))}
        if changes:
            raise UserError(
                f"{path} holds completions of an earlier call, since when there were changes to: "
                f"{', '.join(sorted(set().union(*changes.values())))} (for example {next(iter(changes))}); "
                "use another workdir, or remove the file"
            )
        return done

    def _changes(self, earlier: Completion, item: tuple[Problem, int] | None) -> set[str]:
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


def _committed(path: Path) -> list[Completion]:
    if not path.is_file():
        return []
    content = path.read_bytes()
    whole = content.rfind(b"\n") + 1
    if whole < len(content):
        os.truncate(path, whole)
    return list(records.read_jsonl(path, Completion))


def problems_of(config: EvaluateConfig) -> tuple[Task, list[Problem]]:
    """The task as the configuration asks it, and the problems that it chooses.

    Raises:
      UserError: there is no such task or grader, or the file or the limit does not fit it.
    """
    task = tasks.task(config.task)
    if config.prompt is not None:
        task = dataclasses.replace(task, prompt=config.prompt)
    grader_named(task.grader)  # refused before hours of sampling, not after
    if task.judge and not config.judges:
        raise UserError(
            f"task {task.name} asks a judge; expected --judge.base-url and --judge.model (training cannot run it)"
        )
    if config.hub is not None:
        hub.fetch(config.hub, config.problems_file)
    return task, tasks.select(task.problems_from(config.problems_file), config.limit, config.limit_seed)


def plans(config: EvaluateConfig, task: Task, problems: Sequence[Problem]) -> list[Plan]:
    """A plan for each model and budget; a single one has the run folder to itself, several have one in it each.

    Args:
      problems: all of them; the plans hold those of the shard.

    Raises:
      UserError: a model is none, two are the same, or the shard has no problem.
    """
    part, parts = config.part()
    own = problems[part::parts]
    if not own:
        raise UserError(
            f"shard is {config.shard}, but there are {len(problems)} problems; expected as many shards at most"
        )
    sources: dict[str, tuple[Path | None, str]] = {
        name: (model, fingerprint(model)) for name, model in zip(names_of(config.model), config.model, strict=True)
    }
    if config.asks:
        asked = config.endpoint
        name = asked.model.replace("/", "-")
        sources[f"{name}-endpoint" if name in sources else name] = None, f"{asked.model} at {asked.base_url}"
    limits = [Budget(thinking_tokens=limit) for limit in config.thinking_limits]
    budgets = [Budget(), *limits, *(Budget(waits=waits) for waits in config.waits)]
    made = {
        f"{name}-{budget.name}" if budget.name else name: (*source, name, budget)
        for name, source in sources.items()
        for budget in (budgets if source[0] is not None else budgets[:1])
    }
    return [
        Plan(
            config,
            task,
            own,
            name,
            config.workdir / name if len(made) > 1 else config.workdir,
            *rest,
            share=len(own) / len(problems),
        )
        for name, rest in made.items()
    ]


def names_of(models: Sequence[Path]) -> list[str]:
    """A name for each model: the last part of its path, or as many parts as tell it from the others."""
    parts = [model.absolute().parts for model in models]
    for count in range(1, max(map(len, parts), default=1) + 1):
        names = ["-".join(own[-count:]) for own in parts]
        if len(set(names)) == len(names):
            return names
    raise UserError(f"models are {', '.join(map(str, models))}; expected each of them once")
