"""evaluate, sample and export on a tiny model: what they take up again, what they refuse, what they leave alone."""

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny
from huggingface_hub import ModelCard

from jaxdistill import cli, export, export_check
from jaxdistill.checkpoint import fingerprint, keep_base
from jaxdistill.checkpoint_store import Checkpoints
from jaxdistill.checkpoint_tensors import open_model
from jaxdistill.data import chat
from jaxdistill.errors import RunError, UserError
from jaxdistill.evaluate import run as evaluate
from jaxdistill.evaluate.grade import grade
from jaxdistill.evaluate.plan import Plan, Wanted
from jaxdistill.evaluate.results import read_completions
from jaxdistill.sample import run as sample
from jaxdistill.sample.request import SamplingConfig
from jaxdistill.verify import Verifier

HF = tiny.hf_config("qwen3", vocab_size=512)  # the tokenizer has 263 tokens
C = tiny.config("qwen3", vocab_size=512)
SAMPLING = SamplingConfig(temperature=1.0, max_new_tokens=8)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_folder(tmp_path_factory.mktemp("hf") / "hf", HF, tiny.values(C), C, with_tokenizer=True)


@pytest.fixture(scope="module")
def finished(model: Path, tmp_path_factory: pytest.TempPathFactory) -> evaluate.EvaluateConfig:
    """An evaluation of three problems, two samples each, that ran to its end."""
    folder = tmp_path_factory.mktemp("evaluate")
    rows = [{"id": str(i), "problem": f"{i}+{i}", "answer": str(2 * i)} for i in range(3)]
    (folder / "problems.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = evaluate.EvaluateConfig(
        workdir=folder / "run",
        model=(model,),
        task="problems",
        path=folder / "problems.jsonl",
        samples=2,
        sampling=SAMPLING,
        slots=3,  # rounded up to the 8 devices
        compute_dtype="float32",
    )
    evaluate.main(config)
    return config


@pytest.fixture
def config(finished: evaluate.EvaluateConfig, tmp_path: Path) -> evaluate.EvaluateConfig:
    """The finished evaluation in a folder of the test's own; the model is shared."""
    shutil.copytree(finished.workdir.parent, tmp_path / "evaluate")
    return dataclasses.replace(
        finished, workdir=tmp_path / "evaluate" / "run", path=tmp_path / "evaluate" / "problems.jsonl"
    )


def test_several_samples_without_chance_are_refused(config: evaluate.EvaluateConfig):
    with pytest.raises(UserError, match="samples is 2 at temperature 0"):
        dataclasses.replace(config, sampling=SamplingConfig())


def no_sampling(*_: object) -> None:
    pytest.fail("nothing was left to sample")


def test_a_finished_evaluation_samples_nothing(config: evaluate.EvaluateConfig, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(evaluate, "_sample", no_sampling)
    [summary] = evaluate.main(config).values()
    assert summary.accuracy.n_samples == 6
    written = json.loads((config.workdir / "manifest.json").read_text())
    assert written["model"] == fingerprint(config.model[0])
    assert written["task"].keys() == {"name", "prompt", "grader", "metric", "licence", "why", "source"}
    assert {score.grader for _, score in read_completions(config.workdir)} == {"boxed_math"}


def test_evaluate_goes_on_after_a_torn_line(
    config: evaluate.EvaluateConfig, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    path = config.workdir / "completions.jsonl"
    before = path.read_bytes().splitlines(keepends=True)
    assert len(before) == 6
    path.write_bytes(b"".join(before[:4]) + before[4][:-9])
    asked: list[str] = []
    sampled = evaluate._sample

    def spy(plan: Plan, left: Wanted) -> object:
        asked.extend(left)
        return sampled(plan, left)

    monkeypatch.setattr(evaluate, "_sample", spy)
    evaluate.main(config)
    assert sorted(asked) == sorted(json.loads(line)["id"] for line in before[4:])
    after = path.read_bytes().splitlines(keepends=True)
    assert after[:4] == before[:4]
    assert sorted(after) == sorted(before)  # what was lost is drawn again as it was
    assert "tokens/s" in capsys.readouterr().err


def change_problem(config: evaluate.EvaluateConfig) -> evaluate.EvaluateConfig:
    config.problems_file.write_text(config.problems_file.read_text().replace('"1+1"', '"1+01"'))
    return config


def change_answer(config: evaluate.EvaluateConfig) -> evaluate.EvaluateConfig:
    config.problems_file.write_text(config.problems_file.read_text().replace('"answer": "2"', '"answer": "3"'))
    return config


def change_weights(config: evaluate.EvaluateConfig) -> evaluate.EvaluateConfig:
    """Other weights under the same path."""
    path = config.model[0] / "model.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    return config


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (change_problem, "problems"),
        (change_answer, "problems"),
        (lambda c: dataclasses.replace(c, limit=2), "problems"),
        (change_weights, "model"),
        (lambda c: dataclasses.replace(c, samples=1), "settings"),
        (lambda c: dataclasses.replace(c, seed=1), "settings"),
        (lambda c: dataclasses.replace(c, prompt="{problem}"), "settings"),
        (lambda c: change_problem(dataclasses.replace(c, compute_dtype="bfloat16")), "problems, settings"),
        (lambda c: dataclasses.replace(c, weight_dtype="int8", cache_dtype="int8"), "settings"),
    ],
    ids=["problem", "answer", "limit", "weights", "samples", "seed", "prompt", "two", "8 bits"],
)
def test_evaluate_refuses_completions_of_something_else(
    config: evaluate.EvaluateConfig,
    change: Callable[[evaluate.EvaluateConfig], evaluate.EvaluateConfig],
    named: str,
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setattr(evaluate, "_sample", no_sampling)
    weights = config.model[0] / "model.safetensors"
    whole, kept = weights.read_bytes(), (config.workdir / "config.json").read_bytes()
    try:
        with pytest.raises(UserError, match=rf"changes to: {named} \(for example problems/"):
            evaluate.main(change(config))
    finally:
        weights.write_bytes(whole)
    assert (config.workdir / "config.json").read_bytes() == kept


def test_two_models_are_compared_in_one_command(model: Path, config: evaluate.EvaluateConfig, tmp_path: Path):
    other = tiny.write_folder(tmp_path / "other", HF, tiny.values(C, seed=1), C, with_tokenizer=True)
    words = ["--workdir", str(tmp_path / "both"), "--model", str(model), "--task", "problems", "--samples", "2"]
    words += ["--path", str(config.problems_file), "--sampling.temperature", "1", "--sampling.max-new-tokens", "8"]
    cli.main(["evaluate", *words, "--model", str(other), "--compute-dtype", "float32"])
    summary = json.loads((tmp_path / "both" / "summary.json").read_text())
    assert list(summary["models"]) == ["hf", "other"]
    [comparison] = summary["comparisons"]
    assert (comparison["first"], comparison["second"]) == ("hf", "other")
    assert sum(comparison[name] for name in ("gained", "lost", "both", "neither")) == 6
    rows = {name: read_completions(tmp_path / "both" / name) for name in summary["models"]}
    seeds = [{c.id: c.seed for c, _ in own} for own in rows.values()]
    assert seeds[0] == seeds[1]
    alone = {c.id: c.text for c, _ in read_completions(config.workdir)}
    assert {c.id: c.text for c, _ in rows["hf"]} == alone  # as when it was sampled alone
    html = (tmp_path / "both" / "evaluation.html").read_text()
    assert "other against hf" in html


def test_shards_merge_to_the_table_of_the_whole(config: evaluate.EvaluateConfig, tmp_path: Path):
    [whole] = evaluate.main(config).values()
    shards = [
        dataclasses.replace(config, workdir=tmp_path / f"shard{i}", shard=f"{i}/2", slots=8, seed=config.seed)
        for i in range(2)
    ]
    parts = [summary for shard in shards for summary in evaluate.main(shard).values()]
    assert [part.coverage for part in parts] == pytest.approx([2 / 3, 1 / 3])
    with pytest.raises(UserError, match="changes to: settings"):
        evaluate.main(dataclasses.replace(config, workdir=tmp_path / "other", seed=1, merge=(shards[0].workdir,)))
    merged = dataclasses.replace(config, workdir=tmp_path / "merged", merge=tuple(s.workdir for s in shards))
    [summary] = evaluate.main(merged).values()
    assert summary == whole
    for name in ("summary.json", "scores.jsonl"):
        assert (merged.workdir / name).read_bytes() == (config.workdir / name).read_bytes()
    with pytest.raises(UserError, match="shard is 3/2; expected 0/2 to 1/2"):
        dataclasses.replace(config, shard="3/2")
    with pytest.raises(UserError, match="expected a part such as 0/4"):
        dataclasses.replace(config, shard="one")
    with pytest.raises(UserError, match="one or the other"):
        dataclasses.replace(config, shard="0/2", merge=(tmp_path,))


def test_an_external_judge_ranks_samples(config: evaluate.EvaluateConfig, tmp_path: Path):
    rows = [{"id": c.id, "score": c.sample_index} for c, _ in read_completions(config.workdir)]
    path = tmp_path / "rankings.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    [summary] = evaluate.main(dataclasses.replace(config, rankings=path)).values()
    assert summary.best_of.keys() == {1, 2}
    path.write_text(json.dumps(rows[0]) + "\n")
    with pytest.raises(UserError, match="no score for 5 of 6 completions"):
        evaluate.main(dataclasses.replace(config, rankings=path))


def test_an_unknown_grader_is_refused():
    with (
        pytest.raises(
            UserError, match=r"no grader is named 'judge'; expected one of \['boxed_math', 'judge_factuality'"
        ),
        Verifier() as v,
    ):
        grade([], {}, v, "judge")


def test_sample_writes_and_prints_text_with_brackets(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    text = "[/INST] [a, b] [red]x[/red] :smile:"
    load = chat.load_tokenizer

    def tokenizer_of_brackets(folder: Path) -> object:
        tokenizer = load(folder)
        tokenizer.decode = lambda *_, **__: text
        return tokenizer

    monkeypatch.setattr(chat, "load_tokenizer", tokenizer_of_brackets)
    config = sample.SampleConfig(
        workdir=tmp_path, model=model, prompts=("1+1", "[/b]"), sampling=SAMPLING, compute_dtype="float32", slots=3
    )
    rows = sample.main(config)
    assert [row["text"] for row in rows] == [text] * 2
    assert json.loads((tmp_path / "samples.json").read_text()) == rows
    assert capsys.readouterr().out.splitlines()[1::2] == [text] * 2


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("manifest", [None, "{", "[]", '{"command": "train"}'])
def test_export_leaves_a_foreign_folder_alone(model: Path, tmp_path: Path, manifest: str | None):
    (tmp_path / "model-00001-of-00002.safetensors").write_text("someone's weights")
    if manifest is not None:
        (tmp_path / "manifest.json").write_text(manifest)
    before = contents(tmp_path)
    with pytest.raises(UserError, match="holds files that no export wrote"):
        export.main(export.ExportConfig(workdir=tmp_path, model=model))
    assert contents(tmp_path) == before


def test_export_takes_its_own_folder_again_even_cut_off(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    config = export.ExportConfig(workdir=tmp_path / "out", model=model, verify_tokens=8)
    config.workdir.mkdir()  # empty is as good as new

    def cut_off(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(export, "check", cut_off)
        with pytest.raises(KeyboardInterrupt):
            export.main(config)
    cut = json.loads((config.workdir / "manifest.json").read_text())
    assert (cut["command"], cut["verified"]) == ("export", False)
    export.main(config)
    written = json.loads((config.workdir / "manifest.json").read_text())
    assert (written["verified"], written["model"]) == (True, fingerprint(model))
    assert written["settings"]["verify_tokens"] == 8
    text = " ".join(card(config.workdir).text.split())
    assert "reloaded: every tensor equal bit for bit, logits at positions up to 256 within 0.0e+00 of the" in text
    assert "32 greedy tokens the same" in text


def card(folder: Path) -> ModelCard:
    return ModelCard.load(folder / "README.md")


def test_an_export_that_was_not_verified_says_so(model: Path, tmp_path: Path):
    config = export.ExportConfig(workdir=tmp_path / "out", model=model, verify=False)
    assert export.main(config) is None
    assert json.loads((config.workdir / "manifest.json").read_text())["verified"] is False
    written = card(config.workdir)
    assert "Check of this folder: not verified." in written.text
    assert written.data.to_dict()["library_name"] == "transformers"


@pytest.mark.parametrize(
    ("file", "old", "new", "message"),
    [
        ("config.json", b'"rope_theta": 700.0', b'"rope_theta": 701.0', "config.json says another rope"),
        ("config.json", b'"rms_norm_eps": 1e-05', b'"rms_norm_eps": 1e-06', "config.json says another norm_eps"),
        ("model.safetensors", None, None, r"differ from the model's: model.norm.weight; do not use the export"),
    ],
)
def test_an_export_that_went_wrong_is_told(
    file: str, old: bytes | None, new: bytes | None, message: str, model: Path, tmp_path: Path
):
    config = export.ExportConfig(workdir=tmp_path / "out", model=model, verify_tokens=8)
    assert export.main(config) == 0.0
    path = config.workdir / file
    content = path.read_bytes()
    if old is not None and new is not None:
        assert old in content
        path.write_bytes(content.replace(old, new))
    else:
        path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with tiny.mesh(), open_model(model) as (tensors, c), pytest.raises(RunError, match=message):
        export.check(config.workdir, model, None, tensors, c, 8, 256)


def test_logits_that_differ_or_are_no_numbers_are_told(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    config = export.ExportConfig(workdir=tmp_path / "out", model=model, verify_tokens=8)
    logits = export_check._logits
    for off in (1e-2, float("nan")):
        calls = iter((0.0, off))
        monkeypatch.setattr(
            export_check, "_logits", lambda *a, calls=calls: (x + off for off in [next(calls)] for x in logits(*a))
        )
        with pytest.raises(RunError, match="logits differ"):
            export.main(config)


def test_a_fingerprint_tells_steps_and_changed_files_apart(model: Path, tmp_path: Path):
    keep_base(model, tmp_path)
    with tiny.mesh():
        checkpoints = Checkpoints(tmp_path)
        for step in (2, 4):
            checkpoints.save(step, {"params": tiny.put(tiny.values(C), C)}, {})
        checkpoints.close()
    newest = fingerprint(tmp_path)
    assert newest.startswith("step 4 sha256:")
    assert newest == fingerprint(tmp_path, 4) != fingerprint(tmp_path, 2)
    copy = shutil.copytree(tmp_path, tmp_path.with_name("copy"))
    assert fingerprint(copy) == newest, "a copy of a model is the same model"
    file = max((copy / "checkpoints" / "4").rglob("*"), key=lambda path: path.stat().st_size * path.is_file())
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    assert fingerprint(copy) != newest
    with pytest.raises(UserError, match=r"no checkpoint of step 3; found \[2, 4\]"):
        fingerprint(tmp_path, 3)
