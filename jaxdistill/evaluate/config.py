"""What an evaluation is told: which models, on what, how they are sampled, and which part of it to do."""

import dataclasses
import re
from pathlib import Path
from typing import Literal

from jaxdistill.collect.teacher import TeacherConfig
from jaxdistill.errors import UserError
from jaxdistill.models.quantized import MatmulDtype
from jaxdistill.sample.cache import CacheDtype
from jaxdistill.sample.request import SamplingConfig
from jaxdistill.sharding import MeshConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """Models and an endpoint on one task under one sampling setting; the first is what the others are compared with."""

    workdir: Path  # run folder; run again with the same one to resume
    model: tuple[Path, ...] = ()  # Hugging Face folders, or phase folders of training runs
    endpoint: TeacherConfig = TeacherConfig()  # an OpenAI-compatible API; asked as well once any of it is set
    endpoint_seeds: bool = False  # send each sample's seed, which some APIs take; serve does
    task: str = ""  # name of a file in evaluate/tasks/
    path: Path | None = None  # the task's problems, a JSON Lines file
    hub: str | None = None  # OWNER/NAME[/CONFIG]:SPLIT of the Hugging Face hub, or a folder:SPLIT, instead of path
    limit: int | None = None  # problems, a fixed random choice; all by default
    limit_seed: int = 0  # of that choice
    prompt: str | None = None  # template with {problem}; the task's own by default
    samples: int = 1  # per problem
    seed: int = 0  # of the sampling; a request's own seed also depends on problem and sample
    sampling: SamplingConfig = SamplingConfig()  # of models; an endpoint has its own settings
    thinking_limits: tuple[
        int, ...
    ] = ()  # tokens; for each, also runs in which thinking is ended there (budget forcing)
    waits: tuple[int, ...] = ()  # times; for each, also runs in which thinking is sent on so often by "Wait"
    rankings: Path | None = None  # JSON Lines of {"id": of a completion, "score": number}, for best of k
    shard: str = "0/1"  # which part of the problems: the last of four hosts takes 3/4, each in a workdir of its own
    merge: tuple[Path, ...] = ()  # run folders of shards; their completions are taken over, what none has is sampled
    judge: TeacherConfig = TeacherConfig()  # whom the tasks ask that no rule can grade; set once any of it is
    judge_budget_usd: float | None = None  # of the judge; hard, over all runs on this folder
    judge_budget_tokens: int | None = None  # of the judge, as above; prompt and output together
    judge_agreement: Path | None = None  # agreement.json of a --judge-check of this judge, printed beside its scores
    judge_check: tuple[Path, ...] = ()  # files that people labelled: measures the judge's agreement, and no model
    budget_usd: float | None = None  # of the endpoint; hard, over all runs on this folder
    budget_tokens: int | None = None  # of the endpoint, as above; prompt and output together
    unknown_price: bool = False  # ask endpoint and judge although nobody knows the price; costs then count as 0
    inspect_log: bool = False  # also write inspect.json for each model, as inspect_ai reads it
    slots: int = 32  # requests decoded at once, rounded up to a multiple of the mesh's data x fsdp
    compute_dtype: Literal["bfloat16", "float32"] = "bfloat16"
    weight_dtype: MatmulDtype = "compute"  # that the layers' matrices are stored in
    cache_dtype: CacheDtype = "compute"  # that keys and values are stored in
    mesh: MeshConfig = MeshConfig()

    def __post_init__(self):
        for name in ("endpoint", "judge"):
            if getattr(self, name).larger_max_tokens is not None:
                raise UserError(
                    f"{name}.larger_max_tokens is set; an evaluation asks once, and counts what was cut off"
                )
        if self.limit is not None and self.limit < 1:
            raise UserError(f"limit is {self.limit}; expected 1 or more")
        if self.judge_check:
            if not self.judges:
                raise UserError("--judge-check measures a judge; expected --judge.base-url and --judge.model")
            return
        if not self.task or (self.path is None) == (self.hub is None):
            raise UserError(
                f"task is {self.task!r}, path {self.path} and hub {self.hub}; expected --task and one of --path, --hub"
            )
        if not self.model and not self.asks:
            raise UserError("there is nothing to evaluate; expected --model MODEL, once for each, or --endpoint.model")
        if len(set(self.model)) < len(self.model):
            raise UserError(f"models are {', '.join(map(str, self.model))}; expected each of them once")
        if self.prompt is not None and "{problem}" not in self.prompt:
            raise UserError(f"prompt is {self.prompt!r}; expected a template with {{problem}}")
        if self.samples < 1 or self.slots < 1:
            raise UserError(f"samples is {self.samples} and slots {self.slots}; expected 1 or more")
        if self.model and self.samples > 1 and self.sampling.temperature == 0:
            raise UserError(
                f"samples is {self.samples} at temperature 0, where all samples of a problem are one; "
                "set sampling.temperature, or ask for one sample"
            )
        for name in ("thinking_limits", "waits"):
            values = getattr(self, name)
            if len(set(values)) < len(values) or min(values, default=1) < 1:
                raise UserError(f"{name} are {values}; expected numbers of 1 or more, each once")
            if values and not self.model:
                raise UserError(f"{name} are {values}, but only models can be forced; expected --model MODEL")
        part, parts = self.part()
        if not 0 <= part < parts:
            raise UserError(f"shard is {self.shard}; expected 0/{parts} to {parts - 1}/{parts}")
        if self.merge and parts > 1:
            raise UserError(f"shard is {self.shard}, and there are shards to merge; expected one or the other")

    def part(self) -> tuple[int, int]:
        """Number of this shard, and how many there are."""
        found = re.fullmatch(r"(\d+)/([1-9]\d*)", self.shard)
        if not found:
            raise UserError(f"shard is {self.shard!r}; expected a part such as 0/4")
        return int(found[1]), int(found[2])

    @property
    def problems_file(self) -> Path:
        """Where the problems are; those of the hub are put into the run folder first."""
        if self.path is not None:
            return self.path
        return self.workdir / f"hub-{re.sub(r'[^A-Za-z0-9.-]+', '-', self.hub or '').strip('-')}.jsonl"

    @property
    def judges(self) -> bool:
        """Whether there is a judge to ask."""
        return self.judge != TeacherConfig()

    @property
    def asks(self) -> bool:
        """Whether an endpoint is evaluated."""
        return self.endpoint != TeacherConfig()
