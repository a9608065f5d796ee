"""What of a run goes to the hub: the examples that its models were trained on with their card, and its export."""

from collections.abc import Iterator
from pathlib import Path

import jinja2

from jaxdistill import manifest
from jaxdistill.errors import UserError
from jaxdistill.lineage import Lineage, Stage
from jaxdistill.progress import say
from jaxdistill.publish import Upload, files_of
from jaxdistill.records import whole_file

_CARD = Path(__file__).with_name("dataset_card.md.jinja")


def uploads(found: Lineage, repo: str, report: Path) -> list[Upload]:
    """A data set, and a model where the lineage holds one export.

    Args:
      report: folder of report.html; the card is written beside it.

    Raises:
      UserError: the lineage holds no training, or its examples are not what was read.
    """
    data = dict(_examples(found))
    if not data:
        raise UserError(
            f"{', '.join(map(str, found.roots))}: no training in it; expected a run whose data is to be shown"
        )
    with whole_file(report / "dataset_card.md") as file:
        file.write(_card(found, repo, data))
    beside = {"README.md": report / "dataset_card.md"}
    beside |= {name: report / name for name in ("report.html", "transparency.yaml")}
    for number, stage in enumerate(found.stages.values(), start=1):
        beside[f"manifests/{number:02}_{stage.command}.json"] = stage.folder / "manifest.json"
    result = [Upload(repo=repo, kind="dataset", files={**beside, **{f"data/{k}.jsonl": v for k, v in data.items()}})]
    exports = found.of("export")
    if len(exports) == 1:
        result.append(Upload(repo=repo, kind="model", files=files_of(exports[0].folder)))
    else:
        say(f"no model is uploaded: there are {len(exports)} exports; `jaxdistill export --push-to-hub` uploads one")
    return result


def _examples(found: Lineage) -> Iterator[tuple[str, Path]]:
    """Files of examples by the name of their phase, and of its training where two have one name."""
    seen: dict[str, Path] = {}
    for stage in found.of("train"):
        inputs = {i.recorded: i for i in stage.inputs}
        for phase in stage.config["phases"]:
            read = inputs[str(phase["examples"])]
            if read.found != "same":
                raise UserError(
                    f"{found.name(stage.folder)} read {read.recorded}, which is {read.found}; it cannot be shown"
                )
            name = phase["name"] if phase["name"] not in seen else f"{stage.folder.name}_{phase['name']}"
            if read.path not in seen.values():
                seen[name] = read.path
    yield from seen.items()


def _card(found: Lineage, repo: str, data: dict[str, Path]) -> str:
    template = jinja2.Template(
        _CARD.read_text(encoding="utf-8"),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        keep_trailing_newline=True,
    )
    rows = {name: sum(1 for line in path.open("rb") if line.strip()) for name, path in data.items()}
    asked = (stage.manifest.get("teacher", []) for stage in found.stages.values())
    teachers = sorted({name for names in asked for name in ([names] if isinstance(names, str) else names)})
    return template.render(
        name=repo.rpartition("/")[2],
        data={name: (rows[name], manifest.file_hash(path)) for name, path in data.items()},
        stages=[(stage.command, _counts(stage)) for stage in found.stages.values()],
        teachers=teachers,
        gaps=found.gaps,
        commit=manifest.commit(),
    )


def _counts(stage: Stage) -> str:
    return ", ".join(f"{count} {name}" for name, count in stage.counts.items()) or "–"
