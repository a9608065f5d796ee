"""`jaxdistill demo`: problems -> teacher -> verified chains -> two phases -> evaluation -> Hugging Face, in minutes."""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
from rich.console import Console
from rich.table import Table

from jaxdistill import export, lineage, manifest, metrics, records
from jaxdistill.data import chat
from jaxdistill.demo import student
from jaxdistill.demo.material import ANSWERS, DISTILLED, REFORMATTED, Material, MaterialConfig
from jaxdistill.errors import UserError
from jaxdistill.evaluate import run as evaluate
from jaxdistill.evaluate.grade import Summary
from jaxdistill.evaluate.results import read_completions
from jaxdistill.optim import OptimConfig
from jaxdistill.records import Problem
from jaxdistill.report import page, plots
from jaxdistill.report import run as report
from jaxdistill.sample.request import SamplingConfig
from jaxdistill.train import config as train_config
from jaxdistill.train import run as train
from jaxdistill.train.step import StepConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class DemoConfig:
    """The whole chain at toy size. The defaults take minutes on two CPU cores."""

    workdir: Path = Path("runs/demo")  # run folder; a finished stage is not run again
    teacher: str | None = None  # model at a real API, with its key in OPENAI_API_KEY; None starts the local teacher
    base_url: str = "https://api.openai.com/v1"  # of the real API
    seed: int = 0  # of problems, weights, order and sampling
    train_problems: int = 2600  # asked of the teacher, over all families; each one a paid call at a real API
    reformat_problems: int = 800  # of those, the ones whose solution is reformatted too: another call each
    max_tokens: int = 4096  # output limit of one call, in tokens
    heldout_problems: int = 150  # evaluated
    samples: int = 4  # per held-out problem
    reformatted_epochs: int = 2  # of phase 1
    distilled_epochs: int = 2  # of phase 2
    peak_lr: float = 1.5e-3  # of both phases
    row_tokens: int | None = None  # positions in a packed row; by default two of the longest chains
    batch_rows: int = 2  # rows in an optimizer step: many small steps teach the tables of facts soonest
    answers_only: bool = False  # also train on answers alone for as many steps: what the chains are worth

    def __post_init__(self):
        if self.samples < 1:
            raise UserError(f"samples is {self.samples}; expected 1 or more")
        _ = self.material  # which checks the rest

    @property
    def material(self) -> MaterialConfig:
        """What the stages before training make."""
        names = [field.name for field in dataclasses.fields(MaterialConfig) if hasattr(self, field.name)]
        return MaterialConfig(**{name: getattr(self, name) for name in names})


def main(config: DemoConfig) -> dict[str, Any]:
    """Runs the demo; returns what summary.json holds."""
    return Demo(config).run()


class Demo:
    """One run of the chain; each stage reads files of the ones before and writes its own."""

    def __init__(self, config: DemoConfig):
        self.config, self.workdir = config, config.workdir
        self.console = Console(stderr=True)
        earlier = self.workdir / "config.json"
        if earlier.is_file() and _settings(earlier.read_text()) != _settings(json.dumps(vars(config), default=str)):
            raise UserError(
                f"{self.workdir} holds a demo with other settings; give another --workdir "
                "(its ledgers keep what was paid for)"
            )
        manifest.write_config(self.workdir, config)
        self.history = manifest.History(self.workdir)
        self.material = Material(config.material, self.console)

    def run(self) -> dict[str, Any]:
        """All stages; a finished run is only shown again."""
        done = self.workdir / "summary.json"
        if done.is_file():
            summary = json.loads(done.read_text())
            self.console.print(f"{self.workdir} was finished earlier, at commit {summary['commit']}")
            Console().print(f"report: {self.workdir / 'report.html'}", soft_wrap=True)
            return summary
        self._say("1  problems, and chains from the teacher")
        _, heldout_file = self.material.problems()
        collected = self.material.collect()
        self._say("2  a tokenizer, and a random student")
        self.material.student()
        self._say("3  two phases: reformatted solutions, then distilled chains")
        trained = self._train()
        self._say("4  held-out problems before, between and after")
        summaries = self._evaluate(heldout_file)
        self._say("5  Hugging Face export, reloaded")
        error = export.main(export.ExportConfig(workdir=self.workdir / "export", model=self._phase(DISTILLED)))
        assert error is not None, "it is verified"
        return self._report(collected, trained, summaries, error)

    def _say(self, text: str) -> None:
        self.history.keep()
        self.console.rule(f"{text}  [dim]{self.history.wall_s:.0f} s", align="left")

    def _phase(self, name: str) -> Path:
        return self.workdir / ("ablation" if name == ANSWERS else "train") / name

    def _row_tokens(self) -> int:
        """Two of the longest chains a row, as far as the student has positions."""
        return self.config.row_tokens or min(2 * self.material.longest(), student.POSITIONS)

    def _train(self) -> dict[str, Any]:
        """The paper's two phases; with `answers_only` also the ablation, for as many steps as both together."""
        config = self.config
        both = (
            self._phase_config(REFORMATTED, epochs=config.reformatted_epochs),
            self._phase_config(DISTILLED, epochs=config.distilled_epochs),
        )
        done = train.main(self._train_config("train", both))
        if config.answers_only:
            steps = sum(phase["steps"] for phase in done.values())
            alone = self._phase_config(ANSWERS, steps=steps)
            done |= train.main(self._train_config("ablation", (alone,)))
        return done

    def _phase_config(self, name: str, **length: int) -> train_config.Phase:
        optim = OptimConfig(peak_lr=self.config.peak_lr, warmup_fraction=0.05, weight_decay=0.01)
        return train_config.Phase(name=name, examples=self.workdir / name / "examples.jsonl", optim=optim, **length)

    def _train_config(self, folder: str, phases: tuple[train_config.Phase, ...]) -> train.TrainConfig:
        return train.TrainConfig(
            workdir=self.workdir / folder,
            model=self.workdir / "student",
            phases=phases,
            row_tokens=self._row_tokens(),
            batch_rows=self.config.batch_rows,
            deal_window=1,  # nothing waits for another device
            # The student's heads and rows are too small for the kernels of accelerators
            step=StepConfig(compute_dtype="float32", remat="none", attention="blockwise"),
            seed=self.config.seed,
            save_every=200,
        )

    def _evaluate(self, heldout_file: Path) -> dict[str, Summary]:
        """Every stage's model on the same problems with the same seeds."""
        models = {
            "base": self.workdir / "student",
            "phase1": self._phase(REFORMATTED),
            "phase2": self._phase(DISTILLED),
        }
        if self.config.answers_only:
            models[ANSWERS] = self._phase(ANSWERS)
        return {
            name: summary
            for name, model in models.items()
            for summary in evaluate.main(
                evaluate.EvaluateConfig(
                    workdir=self.workdir / "evaluate" / name,
                    model=(model,),
                    task="problems",
                    prompt="{problem}",  # as the student was trained
                    path=heldout_file,
                    samples=self.config.samples,
                    seed=self.config.seed,
                    sampling=SamplingConfig(temperature=0.5, max_new_tokens=self._answer_tokens(heldout_file)),
                    slots=200,
                    compute_dtype="float32",
                )
            ).values()
        }

    def _answer_tokens(self, heldout_file: Path) -> int:
        """Room for an answer: as long as the longest example, if the student's positions hold it and a prompt."""
        tokenizer = chat.load_tokenizer(self.workdir / "student")
        problems = records.read_jsonl(heldout_file, Problem)
        prompts = [chat.prompt_tokens(tokenizer, [{"role": "user", "content": p.problem}]) for p in problems]
        return min(self.material.longest(), student.POSITIONS - max(map(len, prompts)))

    def _report(
        self,
        collected: Mapping[str, dict[str, int]],
        trained: Mapping[str, Any],
        summaries: Mapping[str, Summary],
        error: float,
    ) -> dict[str, Any]:
        """summary.json, the page, and one table."""
        k = self.config.samples
        wall_s = self.history.wall_s
        summary = {
            "accuracy": {name: s.accuracy.value for name, s in summaries.items()},
            "interval": {name: [s.accuracy.low, s.accuracy.high] for name, s in summaries.items()},
            "average_tokens": {name: s.tokens.average for name, s in summaries.items()},
            "maj_at_k": {name: {"k": k, "value": s.maj_at[k].value} for name, s in summaries.items()},
            "collected": {name: collected[DISTILLED][name] for name in ("verified", "wrong", "truncated", "failed")},
            "export_max_logit_error": error,
            "wall_s": round(wall_s, 1),
            "commit": ", ".join(self.history.commits),
            "seed": self.config.seed,
            "phases": trained,
        }
        path = self.workdir / "report.html"
        inputs = [self.workdir / "problems" / "train.jsonl", self.workdir / "problems" / "heldout.jsonl"]
        manifest.write_manifest(self.workdir, "demo", inputs, summary["collected"], wall_s=wall_s)
        page.write(path, self._page(collected, summaries, wall_s))
        shown = Table(title=f"held-out accuracy, {self.config.heldout_problems} problems x {k} samples")
        for column in ("model", f"avg@{k} [95% interval]", f"maj@{k}", "average tokens"):
            shown.add_column(column, justify="left" if column == "model" else "right")
        for name, s in summaries.items():
            shown.add_row(name, str(s.accuracy), f"{s.maj_at[k].value:.1%}", f"{s.tokens.average:.0f}")
        out = Console()
        out.print(shown)
        counts = ", ".join(f"{count} {name}" for name, count in summary["collected"].items())
        out.print(f"collected: {counts}; export within {error:.1e} of the largest logit; {wall_s:.0f} s")
        out.print(f"report: {path}", soft_wrap=True)
        self.history.keep()
        manifest.write_json(self.workdir / "summary.json", summary)  # last: with it the run counts as finished
        return summary

    def _page(
        self, collected: Mapping[str, dict[str, int]], summaries: Mapping[str, Summary], wall_s: float
    ) -> page.Page:
        folders = {"phase1": self._phase(REFORMATTED), "phase2": self._phase(DISTILLED)}
        rows = {name: metrics.read(folder) for name, folder in folders.items()}
        found = lineage.trace([self.workdir])
        return page.Page(
            title="jaxdistill demo",
            facts={
                "commit": ", ".join(self.history.commits),
                "seed": str(self.config.seed),
                "teacher": self.config.teacher or "the local teacher",
                "wall time": f"{wall_s:.0f} s",
                "device": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
                **manifest.versions(),
            },
            collected=collected[DISTILLED],
            stages=tuple(page.Stage(name=name, summary=summary) for name, summary in summaries.items()),
            losses=plots.curves(rows, "loss"),
            heldout=plots.curves(rows, "heldout_loss"),
            comparisons=self._comparisons(list(summaries)),
            lineage=found,
            transparency=report.transparency(found, "jaxdistill demo"),
        )

    def _comparisons(self, stages: list[str], count: int = 8) -> tuple[page.Comparison, ...]:
        """The first sample of a few problems, as each stage's model answered it."""
        answered = {name: read_completions(self.workdir / "evaluate" / name) for name in stages}
        wanted = list(records.read_jsonl(self.workdir / "problems" / "heldout.jsonl", Problem))[:count]

        def outputs(problem: Problem) -> dict[str, tuple[str, bool]]:
            return {
                name: (completion.text, score.verdict.label == "correct")
                for name, rows in answered.items()
                for completion, score in rows
                if completion.item_id == problem.id and completion.sample_index == 0
            }

        return tuple(page.Comparison(question=p.problem, gold=p.answer or "", outputs=outputs(p)) for p in wanted)


def _settings(config: str) -> dict[str, Any]:
    """What a demo's result depends on: all fields of its config but where it is written."""
    return {name: value for name, value in json.loads(config).items() if name != "workdir"}
