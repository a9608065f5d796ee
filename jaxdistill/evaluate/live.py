"""A task that is run while a model is trained, on the weights as they are."""

import dataclasses
from pathlib import Path
from typing import Literal

import jax

from jaxdistill import manifest, records
from jaxdistill.data import chat
from jaxdistill.errors import UserError
from jaxdistill.evaluate import sampling
from jaxdistill.evaluate.config import EvaluateConfig
from jaxdistill.evaluate.grade import Summary, golds, grade, summarize
from jaxdistill.evaluate.plan import Plan, problems_of
from jaxdistill.models import decoder
from jaxdistill.models.config import Config
from jaxdistill.sample.engine import Engine, EngineConfig
from jaxdistill.sample.request import SamplingConfig
from jaxdistill.verify import Verifier


@dataclasses.dataclass(frozen=True, kw_only=True)
class LiveConfig:
    """What training runs now and then. It takes a copy of the weights in step.compute_dtype for as long as it runs."""

    every: int = 0  # optimizer steps between two runs; also before the first step and after the last; 0 never runs it
    task: str = "problems"  # name of a file in evaluate/tasks/
    path: Path | None = None  # the task's problems, a JSON Lines file
    limit: int | None = None  # problems, a fixed random choice; all by default
    limit_seed: int = 0  # of that choice
    prompt: str | None = None  # template with {problem}; the task's own by default
    samples: int = 1  # per problem
    seed: int = 0  # of the sampling: the same at every step
    sampling: SamplingConfig = SamplingConfig()
    slots: int = 32  # requests decoded at once

    def __post_init__(self):
        if self.every < 0:
            raise UserError(f"evaluate.every is {self.every}; expected 0 or more steps")
        if self.every and self.path is None:
            raise UserError(f"evaluate.every is {self.every}, but evaluate.path names no file of problems")


class Live:
    """A task made ready for a model that is trained on the current mesh.

    Args:
      base: folder with the model's config.json and tokenizer.

    Raises:
      UserError: the task, its problems or the model's positions do not fit together, or the mesh cannot sample.
    """

    def __init__(self, config: LiveConfig, base: Path, c: Config, compute_dtype: Literal["bfloat16", "float32"]):
        assert config.path is not None
        if jax.process_count() > 1:
            raise UserError(
                "evaluate.every needs a run in one process; otherwise evaluate checkpoints with `jaxdistill evaluate`"
            )
        own = {f.name: getattr(config, f.name) for f in dataclasses.fields(config) if f.name != "every"}
        self._config = EvaluateConfig(workdir=base, model=(base,), compute_dtype=compute_dtype, **own)
        self._task, self._problems = problems_of(self._config)
        self._tokenizer, self._c = chat.load_tokenizer(base), c
        self._stops = chat.end_tokens(self._tokenizer, base)
        plan = self._plan(base, 0)
        self._requests = sampling.requests(plan, plan.wanted(), self._tokenizer)
        self._positions = max(len(request.prompt) for request in self._requests) + config.sampling.max_new_tokens
        if self._positions > c.max_positions:
            raise UserError(
                f"evaluate: a prompt and {config.sampling.max_new_tokens} new tokens are {self._positions} positions, "
                f"but the model was made for {c.max_positions}; lower evaluate.sampling.max_new_tokens"
            )

    def _plan(self, folder: Path, step: int) -> Plan:
        name = f"step{step}"
        return Plan(self._config, self._task, self._problems, name, folder / name, folder, name, name)

    def run(self, params: decoder.Params, folder: Path, step: int) -> Summary:
        """Samples and grades; completions, scores and the summary are in a folder `step<N>` of this one."""
        plan = self._plan(folder, step)
        wanted = plan.wanted()
        how = EngineConfig(slots=self._config.slots, compute_dtype=self._config.compute_dtype)
        engine = Engine(params, self._c, self._stops, self._positions, how)
        drawn = sampling.draw(engine, self._tokenizer, plan, wanted, self._requests)
        done = {one.id: one for one in drawn}
        completions = [done[id_] for id_ in wanted]
        with Verifier() as verifier:
            scores = grade(completions, golds(self._problems), verifier, self._task.grader)
            summary = summarize(completions, scores, verifier)
        records.write_jsonl(plan.folder / "completions.jsonl", completions)
        records.write_jsonl(plan.folder / "scores.jsonl", scores)
        manifest.write_json(plan.folder / "summary.json", dataclasses.asdict(summary))
        return summary


def numbers(summary: Summary) -> dict[str, float]:
    """What a row of metrics says of it."""
    return {
        "accuracy": summary.accuracy.value,
        "accuracy_low": summary.accuracy.low,
        "accuracy_high": summary.accuracy.high,
        "output_tokens": summary.tokens.average,
        "truncation_rate": summary.truncation_rate,
        "repetition_rate": summary.repetition_rate,
        "no_answer_rate": summary.no_answer_rate,
    }
