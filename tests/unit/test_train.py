"""The training run: what it writes, how it resumes, and what it refuses."""

import dataclasses
import json
import shutil
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
import tiny

from jaxdistill import export, hf, manifest, metrics, optim, runtime, weights
from jaxdistill.checkpoint import load_model
from jaxdistill.checkpoint_retention import FastTier, Retention
from jaxdistill.data import chat, loader
from jaxdistill.data.packing import Batch
from jaxdistill.errors import RunError, UserError
from jaxdistill.models import decoder
from jaxdistill.models.context import ContextExtension
from jaxdistill.sharding import MeshConfig
from jaxdistill.train import config as train_config
from jaxdistill.train import loop as train_loop
from jaxdistill.train import run as train
from jaxdistill.train import step
from jaxdistill.train.bad_steps import BadStepError, BadStepsConfig
from jaxdistill.train.config import Phase, TrainConfig
from jaxdistill.train.goodput import Goodput
from jaxdistill.train.step import StepConfig

SIZES: dict[str, Any] = {"vocab_size": 264, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
HF, C = tiny.hf_config("qwen2", **SIZES), tiny.config("qwen2", **SIZES)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with a tokenizer, as a Hugging Face folder."""
    return tiny.write_folder(tmp_path_factory.mktemp("model") / "hf", HF, tiny.values(C), C, with_tokenizer=True)


@pytest.fixture(scope="module")
def examples(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_examples(tmp_path_factory.mktemp("data") / "examples.jsonl", 24)


def small(workdir: Path, model: Path, examples: Path, **changes: Any) -> TrainConfig:
    """Six steps on eight devices, saved after each second one."""
    steps = changes.pop("steps", 6)
    phase = Phase(name="sft", examples=examples, steps=steps, optim=optim.OptimConfig(peak_lr=1e-2))
    plain = TrainConfig(
        workdir=workdir,
        model=model,
        phases=(phase,),
        row_tokens=128,
        batch_rows=8,
        mesh=MeshConfig(data=2, fsdp=4),
        step=StepConfig(compute_dtype="float32"),
        save_every=2,
    )
    return dataclasses.replace(plain, **changes)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, model: Path, examples: Path) -> tuple[TrainConfig, Any]:
    """Two phases, and what `main` returned."""
    config = small(tmp_path_factory.mktemp("run"), model, examples, heldout=examples)
    second = dataclasses.replace(config.phases[0], name="second", steps=None, epochs=1)
    config = dataclasses.replace(config, phases=(config.phases[0], second))
    return config, train.main(config)


def test_metrics_hold_every_step(trained: tuple[TrainConfig, Any]):
    config, done = trained
    rows = metrics.read(config.workdir / "sft")
    assert [row["step"] for row in rows] == list(range(7))
    assert rows[0].keys() == {"step", "time", "heldout_loss"}
    names = {"step", "time", "loss", "grad_norm", "loss_tokens", "learning_rate", "step_s", "tokens_per_s", "mfu"}
    names |= {"tokens", "padding_fraction", "flop_imbalance"}
    assert all(row.keys() == names for row in rows[1:-1])
    assert rows[-1].keys() == names | {"heldout_loss"}
    schedule = optim.schedule(config.phases[0].optim, 6)
    assert [row["learning_rate"] for row in rows[1:]] == pytest.approx([float(schedule(i)) for i in range(6)])
    assert rows[-1]["loss"] < rows[1]["loss"]
    assert rows[-1]["heldout_loss"] < rows[0]["heldout_loss"]
    assert all(row["tokens_per_s"] > 0 and row["mfu"] > 0 for row in rows[1:])
    assert list((config.workdir / "sft" / "tensorboard").iterdir())
    assert done["sft"]["heldout_loss"] == rows[-1]["heldout_loss"]


def test_copies_that_differ_are_found_before_the_first_step(
    tmp_path: Path, model: Path, examples: Path, monkeypatch: pytest.MonkeyPatch
):
    """As where hosts read different files: one of two devices that share rows has another token."""

    def placed_apart(batch: Batch, accumulate: int) -> Batch:
        placed = step.place(batch, accumulate)
        parts = [np.array(shard.data) for shard in placed.tokens.addressable_shards]
        parts[-1][..., 0] += 1
        devices = [shard.device for shard in placed.tokens.addressable_shards]
        arrays = [jax.device_put(part, device) for part, device in zip(parts, devices, strict=True)]
        layout = placed.tokens.sharding
        tokens = jax.make_array_from_single_device_arrays(placed.tokens.shape, layout, arrays)
        return dataclasses.replace(placed, tokens=tokens)

    monkeypatch.setattr(train_loop, "place", placed_apart)
    config = small(tmp_path / "run", model, examples, mesh=MeshConfig(data=4, tensor=2))
    with pytest.raises(RunError, match=r"batch.tokens: devices along tensor should hold the same values and do not"):
        train.main(config)
    assert metrics.read(config.workdir / "sft") == []


def test_second_phase_starts_from_the_first(trained: tuple[TrainConfig, Any]):
    config, _ = trained
    first, second = (metrics.read(config.workdir / name) for name in ("sft", "second"))
    assert second[0]["heldout_loss"] == first[-1]["heldout_loss"]


def test_manifest_and_phase_folders_stand_by_themselves(trained: tuple[TrainConfig, Any]):
    config, done = trained
    manifest = json.loads((config.workdir / "manifest.json").read_text())
    assert manifest["phases"] == done
    assert manifest["mfu_formula"] == metrics.MFU_FORMULA
    phase = done["sft"]
    assert phase["examples"] == 24
    assert phase["dropped"] == 0
    assert done["second"]["steps"] == -(-phase["rows"] // 8)
    kept = sorted(int(p.name) for p in (config.workdir / "sft" / "checkpoints").iterdir() if p.name.isdigit())
    assert kept == [4, 6]
    chat.load_tokenizer(config.workdir / "sft" / "base")
    with tiny.mesh(tensor=2):  # another mesh than the one that wrote it
        params, c = load_model(config.workdir / "sft")
        assert c == C
        older, _ = load_model(config.workdir / "sft", step=4)
        assert not np.array_equal(params.embed, older.embed)
        with pytest.raises(UserError, match=r"no checkpoint of step 3; found \[4, 6\]"):
            load_model(config.workdir / "sft", step=3)


def test_finished_run_is_left_as_it_is(trained: tuple[TrainConfig, Any]):
    config, done = trained
    log = config.workdir / "sft" / "metrics.jsonl"
    before = [row["step"] for row in map(json.loads, log.read_text().splitlines()) if "loss" in row]
    assert train.main(config) == done
    assert [row["step"] for row in map(json.loads, log.read_text().splitlines()) if "loss" in row] == before


def test_a_run_that_ends_goes_on_from_the_disk_of_its_host(
    tmp_path: Path,
    model: Path,
    examples: Path,
    trained: tuple[TrainConfig, Any],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    fast = FastTier(folder=tmp_path / "disk", every=2)
    config = small(tmp_path / "run", model, examples, save_every=100, fast=fast)
    write = metrics.MetricsLog.write

    def fail_at_six(self: metrics.MetricsLog, step: int, **values: Any) -> None:
        if step == 6:
            raise InterruptedError
        write(self, step, **values)

    monkeypatch.setattr(metrics.MetricsLog, "write", fail_at_six)
    with pytest.raises(InterruptedError):
        train.main(config)
    monkeypatch.undo()
    assert not list((tmp_path / "run" / "sft" / "checkpoints").iterdir())
    train.main(config)
    assert "resumed from step 4" in capsys.readouterr().err
    rows = metrics.read(tmp_path / "run" / "sft")
    undisturbed = metrics.read(trained[0].workdir / "sft")
    assert [row["loss"] for row in rows if "loss" in row] == [row["loss"] for row in undisturbed if "loss" in row]
    assert not list((tmp_path / "disk").iterdir()), "room is given back at the end of a phase"


def test_a_phase_hands_on_the_average_of_its_weights(tmp_path: Path, model: Path, examples: Path):
    config = small(tmp_path / "run", model, examples, heldout=examples)
    phase = dataclasses.replace(config.phases[0], optim=optim.OptimConfig(peak_lr=1e-2, average_decay=0.99))
    second = dataclasses.replace(phase, name="second", steps=1)
    done = train.main(dataclasses.replace(config, phases=(phase, second)))
    folder = config.workdir / "sft"
    with tiny.mesh():
        average, _ = load_model(folder)
        abstract = {"params": weights.abstract(decoder.template(C))}
        layouts = ocp.checkpoint_utils.construct_restore_args(abstract)
        last = ocp.args.PyTreeRestore(abstract, restore_args=layouts, partial_restore=True)
        with ocp.CheckpointManager(folder / "checkpoints") as manager:
            state = manager.restore(6, args=ocp.args.Composite(state=last))["state"]
        assert not np.allclose(average.embed, state["params"].embed, rtol=1e-3)
    assert metrics.read(config.workdir / "second")[0]["heldout_loss"] == done["sft"]["heldout_loss"]


def test_an_optimizer_of_a_later_phase_is_checked_before_anything_is_written(
    tmp_path: Path, model: Path, examples: Path
):
    config = small(tmp_path / "run", model, examples)
    second = dataclasses.replace(config.phases[0], name="second", optim=optim.OptimConfig(no_decay=("nothing",)))
    with pytest.raises(UserError, match=r"optim.no_decay: nothing names no weight"):
        train.main(dataclasses.replace(config, phases=(*config.phases, second)))
    assert not (tmp_path / "run" / "sft").exists()


def test_context_is_extended_in_the_run_and_in_what_it_leaves(tmp_path: Path, model: Path, examples: Path):
    longer = ContextExtension(positions=512, yarn=True)
    done = train.main(small(tmp_path / "run", model, examples, steps=1, row_tokens=512, context=longer))
    assert done["sft"]["rows"] < 8
    c, values = hf.read_config(tmp_path / "run" / "sft" / "base")
    assert (c.max_positions, c.rope.kind, c.rope.factor) == (512, "yarn", 2.0)
    export.main(export.ExportConfig(workdir=tmp_path / "hf", model=tmp_path / "run" / "sft", verify=False))
    exported, _ = hf.read_config(tmp_path / "hf")
    assert exported == c
    assert values["max_position_embeddings"] == 512
    assert json.loads((tmp_path / "run" / "manifest.json").read_text())["context"]["positions"] == 512
    with pytest.raises(UserError, match=r"row_tokens is 512, .* made for 256 positions .* extend its context"):
        train.main(small(tmp_path / "other", model, examples, row_tokens=512))


def test_what_is_left_out_has_a_receipt_and_the_manifest_says_what_was_read(
    tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]
):
    path = tiny.write_examples(tmp_path / "examples.jsonl", 9)
    with path.open("a") as lines:
        messages = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "1" * 300}]
        lines.write(json.dumps({"id": "long", "messages": messages}) + "\n{broken\n")
    pieces = StepConfig(compute_dtype="float32", accumulate=2)
    config = small(tmp_path / "run", model, path, steps=1, batch_rows=16, step=pieces)
    with pytest.raises(UserError, match=r"examples\.jsonl:11: not valid JSON .*\n.* --bad-rows skip"):
        train.main(config)
    done = train.main(dataclasses.replace(config, bad_rows="skip"))
    assert (done["sft"]["examples"], done["sft"]["dropped"], done["sft"]["bad_rows"]) == (9, 1, 1)
    assert "examples.jsonl:11: not valid JSON" in capsys.readouterr().err
    inputs = json.loads((tmp_path / "run" / "manifest.json").read_text())["inputs"]
    assert inputs[str(path)] == f"sha256:{manifest.file_hash(path)}"
    receipt, broken = map(json.loads, (tmp_path / "run" / "sft" / "dropped.jsonl").read_text().splitlines())
    assert (broken["file"], broken["row"]) == (str(path), 11)
    assert receipt["id"] == "long"
    assert receipt["reason"] == "longer than a row"
    assert receipt["tokens"] > receipt["row_tokens"] == 128
    # The last of the rows is not full, and costs less: what is logged of the step can be held against it
    cache = config.workdir / "prepared"
    rows = loader.prepare(path, chat.load_tokenizer(model), 128, C.vocab, cache, bad_rows="skip")
    dealt = next(loader.batches(rows, config.batch_rows, 6, config.seed, config.deal_window))
    lengths = dealt.batch.lengths  # of the document at each position
    attention = 6 * C.layers * C.heads * C.head_dim * lengths.sum(-1, dtype=float)
    costs = (6 * sum(C.matmul_weights) * 128 + attention).reshape(2, 8)  # a row on each device, twice
    [logged] = metrics.read(config.workdir / "sft")
    assert logged["padding_fraction"] == pytest.approx(np.mean(lengths == 0))
    assert logged["flop_imbalance"] == pytest.approx(np.mean(costs.max(1) / costs.mean(1) - 1))
    assert logged["flop_imbalance"] > 0


def test_attention_plans_for_the_documents_of_the_fullest_row(tmp_path: Path, model: Path, examples: Path):
    config = small(tmp_path / "run", model, examples)
    with jax.set_mesh(config.mesh.build()):
        run = train.Run(config, runtime.Preemption(), Goodput(config.workdir, time.time(), writes=False))
    rows = run.stages[0].rows
    fullest = max(rows.arrays(i).segments.max() for i in range(len(rows)))
    assert run.attention.segments == fullest + 1, "one more for the padding"


def test_attention_that_this_machine_cannot_compute(tmp_path: Path, model: Path, examples: Path):
    config = small(tmp_path / "run", model, examples, step=StepConfig(attention="splash"))
    with pytest.raises(UserError, match=r"step.attention splash: splash runs on TPUs, found cpu; .*here: blockwise"):
        train.main(config)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_loss_that_is_not_finite_stops_the_run(
    what: str, tmp_path: Path, model: Path, examples: Path, monkeypatch: pytest.MonkeyPatch
):
    """Step 4 goes wrong, where a checkpoint is due; the ones before it must stay the newest."""
    make_step = train_loop.make_step

    def poisoned(*arguments: Any) -> Any:
        step, calls = make_step(*arguments), iter(range(1, 100))

        def run(state: Any, batch: Any) -> Any:
            state, values = step(state, batch)
            if next(calls) == 4:
                values |= {{"loss": "loss", "gradient": "grad_norm"}[what]: np.float32("nan")}
            return state, values

        return run

    monkeypatch.setattr(train_loop, "make_step", poisoned)
    config = small(tmp_path, model, examples)
    with pytest.raises(BadStepError, match=r"step 4 of sft: .*nan") as caught:
        train.main(config)
    assert "e1" in str(caught.value), "the documents of the batch are named"
    assert "optim.peak_lr" in str(caught.value)
    assert [row["step"] for row in metrics.read(tmp_path / "sft")] == [1, 2, 3]
    with tiny.mesh():
        params, _ = load_model(tmp_path / "sft")
    assert all(np.isfinite(w).all() for w in jax.tree.leaves(params))
    assert sorted(p.name for p in (tmp_path / "sft" / "checkpoints").iterdir() if p.name.isdigit()) == ["2"]


def test_infinite_weight_of_a_document_is_found(tmp_path: Path, model: Path):
    """A real one, through the whole step: float32 cannot hold the sum of the weights."""
    path = tiny.write_examples(tmp_path / "examples.jsonl", 8, weight=3e38)
    with pytest.raises(BadStepError, match="step 1 of sft: the loss is nan"):
        train.main(small(tmp_path / "run", model, path))


def test_bad_batches_are_skipped_by_policy_and_named(tmp_path: Path, model: Path, examples: Path):
    """One document's weight is more than float32 can add up: its batch is no number, the others are trained on."""
    lines = examples.read_text(encoding="utf-8").splitlines()
    spoiled = json.loads(lines[5]) | {"weight": 3e38}
    path = tmp_path / "examples.jsonl"
    path.write_text("\n".join([*lines[:5], json.dumps(spoiled), *lines[6:]]) + "\n", encoding="utf-8")
    config = small(tmp_path / "run", model, path, bad_steps=BadStepsConfig(policy="skip"))
    train.main(config)
    found = [json.loads(line) for line in (tmp_path / "run" / "sft" / "bad_steps.jsonl").read_text().splitlines()]
    rows = metrics.read(tmp_path / "run" / "sft")
    assert found
    assert len(found) < len(rows)
    assert all(row["action"] == "skipped" and spoiled["id"] in row["documents"] for row in found)
    assert [row["step"] for row in rows if row.get("skipped")] == [row["step"] for row in found]
    assert [row["step"] for row in rows] == list(range(1, len(rows) + 1))
    with tiny.mesh():
        params, _ = load_model(tmp_path / "run" / "sft")
    assert all(np.isfinite(w).all() for w in jax.tree.leaves(params))


def test_a_recorded_step_is_replayed_to_the_bit_and_the_run_stays_as_it_is(
    tmp_path: Path, model: Path, examples: Path, capsys: pytest.CaptureFixture[str]
):
    config = small(tmp_path / "run", model, examples, retention=Retention(keep=3))
    train.main(config)
    kept, last = tmp_path / "run" / "sft" / "checkpoints", metrics.read(tmp_path / "run" / "sft")[-1]
    (kept / "4" / "input" / "metadata").write_text("{")  # damaged: the one before is taken
    (kept / "6.orbax-checkpoint-tmp").mkdir()  # of a save that was killed
    before = {path: path.is_file() and path.read_bytes() for path in (tmp_path / "run").rglob("*")}
    train.main(dataclasses.replace(config, replay="sft:6"))
    told = capsys.readouterr().err
    assert "checkpoint damaged" in told
    assert "as it was recorded" in told
    facts = json.loads((tmp_path / "run" / "replays" / "sft-6.json").read_text())
    assert (facts["loss"], facts["grad_norm"]) == (last["loss"], last["grad_norm"])
    assert (facts["from_step"], facts["step"], last["step"]) == (2, 6, 6)
    assert facts["documents"]
    assert all(path.exists() and (path.is_file() and path.read_bytes()) == content for path, content in before.items())
    with pytest.raises(UserError, match="expected PHASE:STEP, of sft:1 to sft:"):
        train.main(dataclasses.replace(config, replay="sft:0"))


# --- what is refused before anything is trained ----------------------------------------------------------------------


def refused(config: TrainConfig, message: str) -> None:
    with pytest.raises(UserError, match=message):
        train.main(config)
    assert not (config.workdir / "sft" / "checkpoints").exists()


def test_missing_files(tmp_path: Path, model: Path, examples: Path):
    refused(small(tmp_path, tmp_path / "nowhere", examples), "config.json not found .there is no such folder")
    refused(
        small(tmp_path, model, tmp_path / "nowhere.jsonl"),
        r"nowhere\.jsonl: no such file; expected JSON Lines files of examples",
    )
    refused(small(tmp_path, model, examples, heldout=tmp_path / "no.jsonl"), "no.jsonl: no such file")


def test_file_of_a_later_phase_is_looked_for_first(tmp_path: Path, model: Path, examples: Path):
    config = small(tmp_path, model, examples)
    later = dataclasses.replace(config.phases[0], name="later", examples=tmp_path / "nowhere.jsonl")
    refused(
        dataclasses.replace(config, phases=(*config.phases, later)),
        r"nowhere\.jsonl: no such file; expected JSON Lines files of examples",
    )


def test_malformed_line(tmp_path: Path, model: Path):
    path = tiny.write_examples(tmp_path / "examples.jsonl", 3)
    path.write_text(path.read_text() + '{"id": "x", "messages"\n')
    refused(small(tmp_path / "run", model, path), r"examples.jsonl:4: not valid JSON")


def test_nothing_fits_a_row(tmp_path: Path, model: Path):
    path = tiny.write_examples(tmp_path / "examples.jsonl", 3, words=200)
    refused(small(tmp_path / "run", model, path), "none of its 3 examples fits a row of 128 tokens; the shortest has")


def test_row_longer_than_the_context(tmp_path: Path, model: Path, examples: Path):
    refused(small(tmp_path, model, examples, row_tokens=512), "row_tokens is 512, but .* made for 256 positions")


def test_mesh_that_does_not_fit(tmp_path: Path, model: Path, examples: Path):
    refused(small(tmp_path, model, examples, mesh=MeshConfig(data=4)), "needs 4 devices, found 8")
    refused(small(tmp_path, model, examples, mesh=MeshConfig(tensor=8)), "N = 4 is not a multiple of 8")
    refused(small(tmp_path, model, examples, batch_rows=6), "6 rows at a time")


def test_changed_data_is_not_resumed(tmp_path: Path, model: Path, examples: Path):
    """The place in the input is a number of rows: with other rows it would mean something else, without a word."""
    copy = tmp_path / "examples.jsonl"
    copy.write_text(examples.read_text())
    train.main(small(tmp_path / "run", model, copy, steps=2))
    tiny.write_examples(copy, 25)
    with pytest.raises(UserError, match="trained to step 2 with another value of: data, steps, seed"):
        train.main(small(tmp_path / "run", model, copy, steps=4, seed=9))


def test_another_model_or_schedule_is_not_resumed(tmp_path: Path, model: Path, examples: Path):
    config = small(tmp_path / "run", model, examples, steps=2)
    train.main(config)
    written = (tmp_path / "run" / "config.json").read_bytes()
    other = tiny.write_folder(tmp_path / "other", HF, tiny.values(C, seed=1), C, with_tokenizer=True)
    with pytest.raises(UserError, match="trained to step 2 with another value of: model;"):
        train.main(dataclasses.replace(config, model=other))
    faster = dataclasses.replace(config.phases[0], optim=optim.OptimConfig(peak_lr=2e-2))
    with pytest.raises(UserError, match="trained to step 2 with another value of: optim;"):
        train.main(dataclasses.replace(config, phases=(faster,)))
    assert (tmp_path / "run" / "config.json").read_bytes() == written
    copy = shutil.copytree(model, tmp_path / "copy")
    train.main(dataclasses.replace(config, model=copy))  # the same weights


def test_second_phase_does_not_outlive_the_first(tmp_path: Path, model: Path, examples: Path):
    config = small(tmp_path / "run", model, examples, steps=2)
    config = dataclasses.replace(
        config, phases=(config.phases[0], dataclasses.replace(config.phases[0], name="second"))
    )
    train.main(config)
    shutil.rmtree(tmp_path / "run" / "sft")
    longer = dataclasses.replace(config.phases[0], steps=3)
    with pytest.raises(UserError, match="second was trained to step 2 with another value of: model;"):
        train.main(dataclasses.replace(config, phases=(longer, config.phases[1])))


def test_every_phase_is_checked_before_the_first_is_trained(tmp_path: Path, model: Path, examples: Path):
    bad = tmp_path / "bad.jsonl"
    bad.write_text("{\n")
    config = small(tmp_path / "run", model, examples)
    second = dataclasses.replace(config.phases[0], name="second", examples=bad)
    refused(dataclasses.replace(config, phases=(config.phases[0], second)), "bad.jsonl:1: not valid JSON")


def test_tokens_outside_the_vocabulary(tmp_path: Path, examples: Path):
    sizes = {**SIZES, "vocab_size": 48}
    hf_config, c = tiny.hf_config("qwen2", **sizes), tiny.config("qwen2", **sizes)
    small_vocab = tiny.write_folder(tmp_path / "hf", hf_config, tiny.values(c), c, with_tokenizer=True)
    refused(small(tmp_path / "run", small_vocab, examples), r"holds token \d+, outside the model's vocabulary of 48")


def test_settings_that_make_no_sense(tmp_path: Path, model: Path, examples: Path):
    with pytest.raises(UserError, match=r"batch_rows 8 is not a multiple of step\.accumulate 3"):
        small(tmp_path, model, examples, step=StepConfig(accumulate=3))
    with pytest.raises(UserError, match="save_every is 0; expected 1 or more"):
        small(tmp_path, model, examples, save_every=0)
    with pytest.raises(UserError, match=r"phases are named \[\]; expected at least one"):
        small(tmp_path, model, examples, phases=())


def test_weights_that_do_not_fit(tmp_path: Path, model: Path, examples: Path):
    broken = tmp_path / "hf"
    broken.mkdir()
    hf.copy_companions(model, broken)
    (broken / "model.safetensors").write_bytes((model / "model.safetensors").read_bytes())
    (broken / "config.json").write_text(json.dumps({**HF, "intermediate_size": 32, "num_hidden_layers": 2}))
    with pytest.raises(UserError) as caught:
        train.main(small(tmp_path / "run", broken, examples))
    assert "missing model.layers.1.mlp.up_proj.weight [32, 16]" in str(caught.value)
    assert "model.layers.0.mlp.down_proj.weight is [16, 24], expected [16, 32]" in str(caught.value)


def test_examples_must_have_been_checked_against_the_evaluation_sets(tmp_path: Path, model: Path, examples: Path):
    held = tmp_path / "held.jsonl"
    held.write_text('{"problem": "?"}')
    data = tmp_path / "data" / "examples.jsonl"
    data.parent.mkdir()
    shutil.copy(examples, data)
    config = small(tmp_path / "run", model, data, evaluation_sets=(held,))
    with pytest.raises(UserError, match=r"was not checked against .*held\.jsonl.*--allow-contamination"):
        train.main(config)
    train_config.check_decontaminated(dataclasses.replace(config, allow_contamination=True))
    manifest.write_manifest(data.parent, "import", [held], {}, decontaminated=manifest.decontamination([held]))
    train_config.check_decontaminated(config)
    held.write_text('{"problem": "another"}')
    with pytest.raises(UserError, match="was not checked"):
        train_config.check_decontaminated(config)
    with pytest.raises(UserError, match="no such file"):
        train_config.check_decontaminated(dataclasses.replace(config, evaluation_sets=(tmp_path / "none.jsonl",)))
