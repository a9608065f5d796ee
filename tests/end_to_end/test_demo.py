"""The whole chain at its smallest, as a user runs it: `jaxdistill demo`, in a process of its own, without a key."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hub_server import TOKEN, running_hub
from huggingface_hub import ModelCard

from jaxdistill.local_teacher.server import TeacherOptions, running_teacher
from jaxdistill.transparency import index

SIZES = {"train": 60, "reformat": 12, "heldout": 6}
SMALL = [word for name, count in SIZES.items() for word in (f"--{name}-problems", str(count))] + ["--samples", "2"]


def jaxdistill(*words: str) -> subprocess.CompletedProcess[str]:
    # The test process simulates eight devices; the commands run as on a user's machine. No key may be needed.
    environment = {k: v for k, v in os.environ.items() if k not in ("OPENAI_API_KEY", "XLA_FLAGS")}
    command = [sys.executable, "-m", "jaxdistill", *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=600, env=environment, check=False)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished demo."""
    workdir = tmp_path_factory.mktemp("demo") / "run"
    done = jaxdistill("demo", "--workdir", str(workdir), "--answers-only", *SMALL)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "report:" in done.stdout
    return workdir


def test_summary_holds_what_was_promised(run: Path) -> None:
    summary = json.loads((run / "summary.json").read_text())
    assert summary["accuracy"].keys() == {"base", "phase1", "phase2", "answers_only"}
    for stage, (low, high) in summary["interval"].items():
        assert 0 <= low <= summary["accuracy"][stage] <= high <= 1
    assert summary["average_tokens"]["phase2"] > 0
    assert summary["maj_at_k"]["phase2"]["k"] == 2
    assert set(summary["collected"]) == {"verified", "wrong", "truncated", "failed"}
    assert sum(summary["collected"].values()) == 60
    assert summary["export_max_logit_error"] < 1e-4
    assert summary["wall_s"] > 0
    assert summary["commit"]
    ablation, both = summary["phases"]["answers_only"], ("reformatted", "distilled")
    assert ablation["steps"] == sum(summary["phases"][name]["steps"] for name in both)


def test_every_dropped_chain_has_a_receipt(run: Path) -> None:
    counts = json.loads((run / "collected.json").read_text())["distilled"]
    receipts = [json.loads(line) for line in (run / "distilled" / "dropped.jsonl").read_text().splitlines()]
    assert len(receipts) == sum(counts.values()) - counts["verified"]


def test_report_is_one_offline_page(run: Path) -> None:
    page = (run / "report.html").read_text()
    assert page.count("<svg") == 3  # accuracy, loss, pipeline
    assert "Technical transparency index" in page
    assert "src=" not in page.replace('src="data:', "")


def test_report_and_score_of_a_demo_reach_back_to_its_problems(run: Path, tmp_path: Path) -> None:
    """On a copy: a run that was moved is found again by its hashes."""
    copy = tmp_path / "moved"
    shutil.copytree(run, copy)
    done = jaxdistill("report", str(copy), "--output", str(tmp_path / "out"))
    assert done.returncode == 0, done.stderr[-3000:]
    page = (tmp_path / "out" / "report.html").read_text()
    assert "All inputs are what was read." in page
    assert page.count("<svg") == 3
    assert "evaluate/phase2" in page
    work = index.load(tmp_path / "out" / "transparency.yaml")
    verdicts = {name: answer.verdict for name, answer in work.answers.items()}
    proved = {name for name, verdict in verdicts.items() if verdict in index.EARNS}
    opened = {"data_documented", "selection_criteria", "ablations", "custom_metrics"}
    public = {name for name, i in index.indicators().items() if i.dimension == "open_source"}
    assert proved == index.indicators().keys() - opened - public
    assert verdicts["reinforcement_learning"] == "unused"

    examples = run / "distilled" / "examples.jsonl"
    whole = examples.read_bytes()
    try:
        examples.write_bytes(whole + b"\n")
        done = jaxdistill("tti", "run", str(run), "--output", str(tmp_path / "changed.yaml"))
    finally:
        examples.write_bytes(whole)
    assert done.returncode == 0, done.stderr[-3000:]
    changed = index.load(tmp_path / "changed.yaml")
    assert changed.answers["pipeline"].verdict == "open"
    assert "examples.jsonl, which is changed" in changed.answers["pipeline"].reason
    assert changed.answers["search_algorithm"].verdict == "open"


def test_a_report_is_pushed_with_its_data_set_and_model(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home, output = tmp_path / "home", tmp_path / "report"
    for name, value in {"HF_TOKEN": TOKEN, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1"}.items():
        monkeypatch.setenv(name, value)
    with running_hub() as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        done = jaxdistill("report", str(run), "--output", str(output), "--push-to-hub", "me/demo")
    assert done.returncode == 0, done.stderr[-3000:]
    data, model = hub.files["dataset", "me/demo"], hub.files["model", "me/demo"]
    assert set(hub.private.values()) == {True}
    for name in ("reformatted", "distilled", "answers_only"):
        assert data[f"data/{name}.jsonl"] == (run / name / "examples.jsonl").read_bytes()
    assert data["report.html"] == (output / "report.html").read_bytes()
    assert "local-teacher" in data["README.md"].decode()
    assert model["model.safetensors"] == (run / "export" / "model.safetensors").read_bytes()
    assert {"README.md", "config.json", "tokenizer.json", "generation_config.json"} <= model.keys()
    written = [path for folder in (home, output) for path in folder.rglob("*") if path.is_file()]
    assert not [path for path in written if TOKEN.encode() in path.read_bytes()]
    assert TOKEN not in done.stdout + done.stderr + "".join(map(repr, (*data.values(), *model.values())))


def test_the_exports_card_says_what_it_was_trained_on(run: Path) -> None:
    card = ModelCard.load(run / "export" / "README.md")
    manifest = json.loads((run / "train" / "manifest.json").read_text())
    assert card.data.to_dict()["library_name"] == "transformers"
    assert manifest["model"] in card.text
    for name, phase in manifest["phases"].items():
        assert f"| {name} | {phase['steps']} | {phase['examples']} |" in card.text
    for found in manifest["inputs"].values():
        assert found in card.text


def test_export_loads_in_transformers_with_the_same_logits(run: Path) -> None:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    import tiny

    from jaxdistill import export_check, hf

    model = transformers.AutoModelForCausalLM.from_pretrained(run / "export", dtype=torch.float32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(run / "export")
    text = tokenizer.apply_chat_template([{"role": "user", "content": "Work modulo 10."}], tokenize=False)
    ids = np.array([tokenizer(text)["input_ids"]], np.int32)
    with torch.no_grad():
        theirs = model(torch.from_numpy(ids).long()).logits.numpy()
    with tiny.mesh():
        params, config = hf.load(run / "export")
        ours = export_check.logits(params, ids, config)
    assert np.abs(ours - theirs).max() < 1e-4 * np.abs(theirs).max()


def test_a_finished_demo_runs_again_without_work(run: Path) -> None:
    before = (run / "teacher_log.jsonl").read_text()
    done = jaxdistill("demo", "--workdir", str(run), "--answers-only", *SMALL)
    assert done.returncode == 0, done.stderr[-3000:]
    assert (run / "teacher_log.jsonl").read_text() == before


def test_a_named_teacher_at_an_url_is_asked_instead(tmp_path: Path) -> None:
    """What `--teacher` does at a real API, against the local teacher's server."""
    log = tmp_path / "log.jsonl"
    with running_teacher(TeacherOptions(log=log)) as url:
        words = ["--teacher", "local-teacher", "--base-url", url, "--workdir", str(tmp_path / "run")]
        done = jaxdistill("demo", *words, *SMALL)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "72 calls of at most 4096 output tokens" in " ".join(done.stderr.split())
    assert len(log.read_text().splitlines()) == 72


def test_other_settings_in_the_same_folder_are_refused(run: Path) -> None:
    done = jaxdistill("demo", "--workdir", str(run), *SMALL, "--seed", "1")
    assert done.returncode == 2
    assert "other settings" in done.stderr
