"""`jaxdistill report RUN...`: one page about any run folders, from the final table back to the problems."""

import dataclasses
import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

from rich.console import Console

from jaxdistill import lineage, manifest, metrics, publish
from jaxdistill.errors import UserError
from jaxdistill.evaluate import tasks
from jaxdistill.evaluate.grade import Summary
from jaxdistill.evaluate.results import read_completions
from jaxdistill.lineage import Lineage, Stage
from jaxdistill.records import from_dict, whole_file
from jaxdistill.report import dataset, page, plots
from jaxdistill.report.answers import Entry
from jaxdistill.train import goodput
from jaxdistill.transparency import index
from jaxdistill.transparency import run as own


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReportConfig:
    """Run folders to report on; those that they read from are found by themselves."""

    runs: tuple[Path, ...]  # folders of stages, or folders that hold some
    output: Path | None = None  # folder for the report; by default `report` in the first run folder
    problems: int = 8  # shown with what every model answered
    push_to_hub: str = ""  # OWNER/NAME of a data set, and of a model if one was exported, on the Hugging Face hub
    public: bool = False  # let everyone see them there; private by default
    dry_run: bool = False  # of the upload: list its files alone

    def __post_init__(self) -> None:
        if not self.runs:
            raise UserError("no run folder was given; expected one or more: jaxdistill report RUN...")
        if self.push_to_hub:
            publish.check(self.push_to_hub, self.dry_run)

    @property
    def workdir(self) -> Path:
        """Where report.html and transparency.yaml are written."""
        return self.output or self.runs[0] / "report"


def main(config: ReportConfig) -> page.Page:
    """Writes report.html, and transparency.yaml for a person to answer what is open.

    Raises:
      UserError: as `jaxdistill.lineage.trace`; as `dataset.uploads` and `publish.push`.
      RunError: as `publish.push`.
    """
    found = lineage.trace(config.runs)
    name = config.runs[0].resolve().name
    shown = page_of(found, name, config.problems)
    path = config.workdir / "report.html"
    page.write(path, shown)
    assert shown.transparency is not None
    with whole_file(config.workdir / "transparency.yaml") as file:
        file.write(index.dump(shown.transparency.work))
    manifest.write_config(config.workdir, config)
    console = Console(highlight=False, soft_wrap=True)
    console.print(f"transparency: {shown.transparency.score.total} of 100, open answers in transparency.yaml beside it")
    console.print(f"report: {path}")
    if config.push_to_hub:
        for upload in dataset.uploads(found, config.push_to_hub, config.workdir):
            publish.push(upload, config.public, config.dry_run)
    return shown


def page_of(found: Lineage, name: str, problems: int = 8) -> page.Page:
    """The page about a lineage."""
    evaluations = found.of("evaluate")
    rows = {found.name(phase): metrics.read(phase) for stage in found.of("train") for phase in _phases(stage)}
    return page.Page(
        title=name,
        facts=_facts(found, sum(row.get("step_s", 0.0) for phase in rows.values() for row in phase)),
        collected=dict(sum((Counter(stage.counts) for stage in found.of("collect")), Counter())),
        stages=tuple(page.Stage(name=found.name(s.folder), summary=_summary(s)) for s in evaluations),
        losses=plots.curves(rows, "loss"),
        heldout=plots.curves(rows, "heldout_loss"),
        comparisons=_comparisons(found, evaluations, problems),
        lineage=found,
        transparency=transparency(found, name),
        lede=False,
    )


def transparency(found: Lineage, name: str) -> Entry:
    """What a run says of itself, its metrics defined by the page that this is shown on."""
    work = own.work(found, name, page="report.html")
    return Entry(work=work, score=index.score(work))


def _facts(found: Lineage, step_s: float) -> Mapping[str, str]:
    """What all stages together say.

    Args:
      step_s: seconds of all training steps.
    """
    stages = list(found.stages.values())
    clocks = {found.name(s.folder): goodput.read(s.folder) for s in found.of("train")}
    costs = [stage.cost_usd for stage in stages if stage.cost_usd is not None]
    return {
        "commit": ", ".join(sorted({str(stage.manifest.get("commit", "unknown")) for stage in stages})),
        "teacher's answers": f"${sum(costs):,.2f}" if costs else "none here",
        "training": f"{step_s / 3600:.2f} hours of steps",
        **{f"time of {name}": goodput.in_words(clock) for name, clock in clocks.items() if clock},
        "devices": ", ".join(sorted({s.manifest.get("devices", "not written down") for s in found.of("train")})),
        **{k: v for stage in stages[-1:] for k, v in stage.manifest.get("versions", {}).items()},
    }


def _phases(stage: Stage) -> list[Path]:
    """Folders of a training run's phases."""
    return [stage.folder / name for name in stage.manifest.get("phases", {})]


def _summary(stage: Stage) -> Summary:
    """The summary that an evaluation wrote; JSON has the k of pass@k and maj@k as text."""
    path = stage.folder / "summary.json"
    if not path.is_file():
        raise UserError(f"{path}: no such file; expected the summary of a finished evaluation")
    summary = from_dict(json.loads(path.read_text(encoding="utf-8")), Summary, f"{path}")
    by_k = {name: {int(k): v for k, v in getattr(summary, name).items()} for name in ("pass_at", "maj_at", "best_of")}
    return dataclasses.replace(summary, **by_k)


def _comparisons(found: Lineage, evaluations: list[Stage], count: int) -> tuple[page.Comparison, ...]:
    """The first sample of a few problems, as each model answered it; problems of one file stand together."""
    outputs: dict[tuple[Path, str], dict[str, tuple[str, bool]]] = {}
    files: dict[Path, str] = {}  # task by file of problems
    for stage in evaluations:
        read = next((i for i in stage.inputs if i.path.name != "config.json" and i.found == "same"), None)
        if read is None or not (stage.folder / "completions.jsonl").is_file():
            continue
        files[read.path] = stage.manifest["task"]["name"]
        for completion, score in read_completions(stage.folder):
            if completion.sample_index == 0:
                of_problem = outputs.setdefault((read.path, completion.item_id), {})
                of_problem[found.name(stage.folder)] = (completion.text, score.verdict.label == "correct")
    shown = []
    for path, task in files.items():
        asked = [p for p in tasks.task(task).problems_from(path) if (path, p.id) in outputs][:count]
        shown += [page.Comparison(question=p.problem, gold=p.answer or "", outputs=outputs[path, p.id]) for p in asked]
    return tuple(shown)
