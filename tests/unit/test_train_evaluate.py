"""A task that is run while training: on the weights as they are, in the metrics, and without touching the training."""

import dataclasses
import json
from pathlib import Path

import pytest
import tiny

from jaxdistill import metrics, optim
from jaxdistill.errors import UserError
from jaxdistill.evaluate import run as evaluate
from jaxdistill.evaluate.config import EvaluateConfig
from jaxdistill.evaluate.live import LiveConfig
from jaxdistill.records import Completion, read_jsonl
from jaxdistill.sample.request import SamplingConfig
from jaxdistill.sharding import MeshConfig
from jaxdistill.train import run as train
from jaxdistill.train.config import Phase, TrainConfig
from jaxdistill.train.step import StepConfig

SIZES = {"vocab_size": 264, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}


def test_a_task_is_run_on_the_live_weights(tmp_path: Path):
    hf, c = tiny.hf_config("qwen2", **SIZES), tiny.config("qwen2", **SIZES)  # type: ignore[arg-type]
    model = tiny.write_folder(tmp_path / "hf", hf, tiny.values(c), c, with_tokenizer=True)
    examples = tiny.write_examples(tmp_path / "examples.jsonl", 16)
    rows = [{"id": str(i), "problem": f"{i}+{i}", "answer": str(2 * i)} for i in range(3)]
    (tmp_path / "problems.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    sampling = SamplingConfig(temperature=1.0, max_new_tokens=8)
    live = LiveConfig(every=2, path=tmp_path / "problems.jsonl", samples=2, sampling=sampling, slots=8)
    config = TrainConfig(
        workdir=tmp_path / "run",
        model=model,
        phases=(Phase(name="sft", examples=examples, steps=3, optim=optim.OptimConfig(peak_lr=1e-2)),),
        evaluate=live,
        row_tokens=128,
        batch_rows=8,
        mesh=MeshConfig(data=2, fsdp=2, context=2),
        step=StepConfig(compute_dtype="float32"),
    )
    train.main(config)
    logged = {row["step"]: row for row in metrics.read(tmp_path / "run" / "sft")}
    assert [step for step, row in logged.items() if "accuracy" in row] == [0, 2, 3]
    assert logged[3].keys() > {"loss", "accuracy_low", "accuracy_high", "output_tokens", "truncation_rate"}
    alone = dataclasses.replace(config, workdir=tmp_path / "alone", evaluate=LiveConfig())
    train.main(alone)
    losses = [row["loss"] for row in metrics.read(tmp_path / "alone" / "sft")]
    assert losses == [logged[step]["loss"] for step in (1, 2, 3)]
    after = EvaluateConfig(
        workdir=tmp_path / "after",
        model=(tmp_path / "run" / "sft",),
        task="problems",
        path=tmp_path / "problems.jsonl",
        samples=2,
        sampling=sampling,
        slots=8,
        compute_dtype="float32",
    )
    evaluate.main(after)
    folders = (tmp_path / "run" / "sft" / "evaluations" / "step3", tmp_path / "after")
    texts = [{c.id: c.text for c in read_jsonl(folder / "completions.jsonl", Completion)} for folder in folders]
    assert texts[0] == texts[1]  # what evaluate samples from the checkpoint of that step
    too_long = dataclasses.replace(live, sampling=SamplingConfig(temperature=1.0, max_new_tokens=300))
    with pytest.raises(UserError, match=r"lower evaluate\.sampling\.max_new_tokens"):
        train.main(dataclasses.replace(config, evaluate=too_long))
    with pytest.raises(UserError, match=r"evaluate\.path names no file"):
        LiveConfig(every=1)
