"""The way back from a table to its problems, through folders that the real writers made."""

import json
import shutil
from pathlib import Path

import pytest
import rows

from jaxdistill import cli, lineage, manifest
from jaxdistill.curate.examples import ExamplesConfig, main
from jaxdistill.errors import UserError
from jaxdistill.local_teacher.problems import generate
from jaxdistill.records import Chain, write_jsonl
from jaxdistill.transparency import index
from jaxdistill.transparency import run as own


def chain(name: str) -> Chain:
    return rows.chain(id=f"{name}/0", problem_id=name, cost_usd=0.25)


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    """Problems -> chains -> examples, as `collect` and `examples` leave them."""
    folder = tmp_path / "runs"
    problems = folder / "problems.jsonl"
    asked = list(generate("turns", 3, seed=0, split="train"))
    write_jsonl(problems, asked)
    write_jsonl(folder / "chains" / "chains.jsonl", [chain(one.id) for one in asked])
    facts = {"teacher": ["a teacher"], "prompt": {"name": "p", "text": "Think."}, "cost_usd": 0.75}
    manifest.write_manifest(folder / "chains", "collect", [problems], {"verified": 3, "wrong": 0}, **facts)
    main(ExamplesConfig(chains=folder / "chains" / "chains.jsonl", workdir=folder / "examples"))
    return folder


def test_a_stage_leads_back_to_all_that_it_stands_on(runs: Path):
    found = lineage.trace([runs / "examples"])  # the other folder is found by what this one read
    assert [stage.command for stage in found.stages.values()] == ["collect", "examples"]
    last = found.of("examples")[0]
    assert [stage.command for stage in found.behind(last)] == ["collect", "examples"]
    assert last.inputs[0].found == "same"
    assert last.inputs[0].maker == runs / "chains"
    assert found.of("collect")[0].cost_usd == 0.75
    assert found.of("collect")[0].counts == {"verified": 3, "wrong": 0}
    assert found.gaps == []


def test_a_changed_and_a_missing_input_are_gaps(runs: Path):
    with (runs / "chains" / "chains.jsonl").open("a") as file:
        file.write("\n")
    (runs / "problems.jsonl").unlink()
    found = lineage.trace([runs])
    gaps = found.gaps
    assert len(gaps) == 2
    assert "problems.jsonl, which is missing" in gaps[0]
    assert "chains.jsonl, which is changed" in gaps[1]
    manifest.write_manifest(runs / "sft", "train", {Path("gs://bucket/examples.jsonl"): "sha256:0"}, {})
    assert lineage.trace([runs / "sft"]).gaps == ["sft read gs://bucket/examples.jsonl, which is remote"]


def test_a_run_that_was_moved_is_found_by_its_hashes(runs: Path, tmp_path: Path):
    moved = tmp_path / "elsewhere" / "mine"
    shutil.move(runs, moved)
    found = lineage.trace([moved])
    assert {i.found for stage in found.stages.values() for i in stage.inputs} == {"same"}
    assert found.of("examples")[0].inputs[0].maker == moved / "chains"


def test_relative_paths_are_read_from_any_folder(runs: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(runs.parent)
    main(ExamplesConfig(chains=Path("runs/chains/chains.jsonl"), workdir=Path("runs/again")))
    monkeypatch.chdir("/")
    found = lineage.trace([runs / "again"])
    assert found.of("examples")[0].inputs[0].maker == runs / "chains"


def test_weights_are_compared_with_the_fingerprint_that_was_taken(runs: Path):
    model = runs / "model"
    model.mkdir()
    (model / "config.json").write_text("{}")
    (model / "model.safetensors").write_bytes(b"weights")
    files = sorted(model.glob("*.safetensors"))
    taken = manifest.weights_fingerprint(model / "config.json", model, files)
    manifest.write_manifest(runs / "train", "train", [model / "config.json"], {}, model=taken, phases={})
    before = lineage.trace([runs / "train"]).of("train")[0].inputs
    assert [i.found for i in before] == ["same", "same"]
    (model / "model.safetensors").write_bytes(b"weightz")
    after = lineage.trace([runs / "train"]).of("train")[0].inputs
    assert [i.found for i in after] == ["same", "changed"]


def test_examples_that_no_stage_wrote_are_a_gap(runs: Path, tmp_path: Path):
    alone = tmp_path / "chains.jsonl"
    shutil.copy(runs / "chains" / "chains.jsonl", alone)
    main(ExamplesConfig(chains=alone, workdir=tmp_path / "alone"))
    found = lineage.trace([tmp_path / "alone"])
    assert found.gaps == [f"alone read {alone}, which no stage wrote"]


def test_a_folder_without_a_manifest_is_refused_and_other_tools_manifests_are_passed_over(tmp_path: Path):
    (tmp_path / "manifest.json").write_text(json.dumps({"name": "a web app"}))
    with pytest.raises(UserError, match="no run folder"):
        lineage.trace([tmp_path])
    (tmp_path / "manifest.json").write_text("{")
    with pytest.raises(UserError, match="not valid JSON"):
        lineage.trace([tmp_path])


def test_a_run_without_training_proves_its_data_and_nothing_more(runs: Path):
    work = own.work(lineage.trace([runs]), "mine")
    earned = {name for name, answer in work.answers.items() if answer.verdict in index.EARNS}
    assert earned == {"data_sources", "synthetic_generation"}
    assert index.score(work).total == index.Points(7, 100)


def test_a_chain_that_was_not_verified_earns_nothing(runs: Path):
    path = runs / "chains" / "chains.jsonl"
    path.write_text(path.read_text().replace('"label": "correct"', '"label": "unverifiable"'))
    answer = own.work(lineage.trace([runs / "chains"]), "mine").answers["synthetic_generation"]
    assert answer.verdict == "open"
    assert "not found correct" in answer.reason


def test_every_command_that_leaves_a_manifest_was_judged():
    """A new one is added to STAGES if it is no search and no reinforcement learning, else to the answers about them."""
    without_manifest = {"plan", "report"}
    writing = {name.split()[-1] for name, command in cli.COMMANDS.items() if command.writes}
    assert writing - without_manifest | {"compare"} == own.STAGES  # evaluate's own, of several models together


def test_an_unknown_stage_may_be_a_search(runs: Path):
    manifest.write_manifest(runs / "other", "beam", [], {})
    answer = own.work(lineage.trace([runs]), "mine").answers["search_algorithm"]
    assert answer.verdict == "open"


def test_a_journey_is_a_search(runs: Path):
    path = runs / "chains" / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"method": "journey"}))
    answer = own.work(lineage.trace([runs]), "mine").answers["search_algorithm"]
    assert answer.verdict == "open"
    assert "method journey" in answer.evidence[0]


def test_imported_thoughts_have_sources_that_no_folder_proves(runs: Path):
    manifest.write_manifest(runs / "adopted", "import", [], {})
    answers = own.work(lineage.trace([runs]), "mine").answers
    assert {answers[name].verdict for name in ("data_sources", "synthetic_generation")} == {"open"}
