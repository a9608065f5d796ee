"""A trained student as the next teacher: train, serve, collect from it, train the next student on what it said."""

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tiny
from test_serve import KEY, serving

from jaxdistill import metrics
from jaxdistill.curate.examples import example
from jaxdistill.records import Chain, Problem, read_jsonl, write_jsonl

HF = tiny.hf_config("qwen2", vocab_size=264, hidden_size=64, max_position_embeddings=128)
PROBLEMS = [Problem(id=f"p{i}", problem=f"{i}+1=?", answer=str(i + 1)) for i in range(4)]


def jaxdistill(*words: Any) -> None:
    environment = {"JAX_PLATFORMS": "cpu", "TEACHER_KEY": KEY}
    command = [sys.executable, "-m", "jaxdistill", *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-3000:]


def trained(workdir: Path, model: Path, examples: Path, steps: int) -> Sequence[float]:
    """Losses of a run; its checkpoint is in workdir/sft."""
    of_phase = ("--phases.0.examples", examples, "--phases.0.steps", steps, "--phases.0.optim.peak-lr", 0.003)
    rows = ("--row-tokens", 128, "--batch-rows", 2, "--step.compute-dtype", "float32", "--save-every", 1000)
    jaxdistill("train", "--workdir", workdir, "--model", model, *of_phase, *rows)
    return [row["loss"] for row in metrics.read(workdir / "sft")]


def test_a_student_teaches_the_next(tmp_path: Path):
    problems, by_hand = tmp_path / "problems.jsonl", tmp_path / "by_hand.jsonl"
    write_jsonl(problems, PROBLEMS)
    thoughts = [f"<think>\n1 more than {i}\n</think>\n\\boxed{{{i + 1}}}" for i in range(len(PROBLEMS))]
    write_jsonl(by_hand, [example(p, text, "hand") for p, text in zip(PROBLEMS, thoughts, strict=True)])
    c = tiny.config("qwen2", **{k: HF[k] for k in ("vocab_size", "hidden_size", "max_position_embeddings")})
    base = tiny.write_folder(tmp_path / "base", HF, tiny.values(c), c, with_tokenizer=True)
    before = trained(tmp_path / "student", base, by_hand, steps=200)

    serve = serving(tmp_path / "student" / "sft", tmp_path / "errors", positions=128)
    with serve as (url, _):
        of_teacher = ("--teacher.base-url", url, "--teacher.model", "tiny", "--teacher.api-key-env", "TEACHER_KEY")
        how = ("--teacher.max-tokens", 60, "--teacher.temperature", 0, "--prompt", "")
        jaxdistill("collect", "--problems", problems, "--workdir", tmp_path / "chains", *of_teacher, *how)
    jaxdistill("examples", "--chains", tmp_path / "chains" / "chains.jsonl", "--workdir", tmp_path / "examples")

    chains = sorted(read_jsonl(tmp_path / "chains" / "chains.jsonl", Chain), key=lambda chain: chain.problem_id)
    assert [chain.messages[-1]["reasoning_content"].strip() for chain in chains] == [
        f"1 more than {i}" for i in range(len(PROBLEMS))
    ]
    assert {(chain.teacher, chain.verdict.label) for chain in chains} == {("tiny", "correct")}
    said = [json.loads(line) for line in (tmp_path / "examples" / "examples.jsonl").read_text().splitlines()]
    assert sorted(row["messages"][-1]["content"] for row in said) == thoughts
    after = trained(tmp_path / "next", tmp_path / "student" / "sft", tmp_path / "examples" / "examples.jsonl", steps=2)
    assert after[0] < 0.1 < before[0], "the student knows already what it said itself"
