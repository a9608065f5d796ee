"""lm-evaluation-harness against `jaxdistill serve`, and on the same weights in transformers."""

import json
import os
import subprocess
import sys
from pathlib import Path

import harness
import pytest
import tiny

HF = tiny.hf_config("qwen3", vocab_size=263, max_position_embeddings=512)
C = tiny.config("qwen3", vocab_size=263, max_position_embeddings=512)


def test_the_harness_says_of_a_served_model_what_it_says_of_its_weights(tmp_path: Path):
    if not harness.HARNESS.is_dir():
        pytest.skip(f"{harness.HARNESS} is absent; `make test` installs lm-evaluation-harness there")
    model = tiny.write_folder(tmp_path / "hf", HF, tiny.values(C), C, with_tokenizer=True)
    rows = [{"question": f"What is 500+{i}?", "answer": f"I add them.\n#### {500 + i:,}"} for i in (1, 501)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = [sys.executable, harness.__file__, "--model", model, "--problems", tmp_path / "rows.jsonl"]
    command += ["--output", tmp_path / "found.json", "--limit", "2", "--tokens", "12", "--positions", "512"]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    done = subprocess.run([*map(str, command)], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-5000:]
    found = json.loads((tmp_path / "found.json").read_text())
    for way in ("completions", "chat"):
        assert found[way]["same_text"] == found[way]["problems"] == 2
        assert found[way]["characters"] > 0
    choice = found["choice"]
    assert choice["log_likelihoods"] == 8
    assert choice["largest_difference"] < 1e-3 < -choice["average"]
    assert choice["greedy_differs"] == 0
