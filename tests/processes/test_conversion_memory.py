"""Conversion of a model of a billion weights, disk to disk, in less memory than half of it takes."""

import shutil
from pathlib import Path
from typing import Any

import conversion
import pytest

from jaxdistill.hf_tensors import Tensors, differing

SHAPE: dict[str, Any] = {
    **conversion.QWEN3_8B,
    "vocab_size": 32_768,
    "hidden_size": 1536,
    "intermediate_size": 6144,
    "num_attention_heads": 16,
}
LIBRARIES = 0.6e9  # what the interpreter and jax take by themselves
SHARD = 0.2e9
LARGEST = 2 * SHAPE["vocab_size"] * SHAPE["hidden_size"]
LIMIT = LIBRARIES + 2 * SHARD + LARGEST


@pytest.mark.soak
def test_neither_way_holds_the_model(tmp_path: Path, full_size: bool):
    layers = 28 if full_size else 14  # 1.16 or 0.63 billion weights, in bfloat16
    if shutil.disk_usage(tmp_path).free < 8e9:
        pytest.skip("needs 8 GB of disk")
    random = conversion.write_model(tmp_path / "source", {**SHAPE, "num_hidden_layers": layers})
    size = sum(path.stat().st_size for path in (tmp_path / "source").glob("*.safetensors"))
    assert size > LIMIT
    importing = ["import", f"--model={tmp_path / 'source'}", f"--workdir={tmp_path / 'imported'}"]
    exporting = ["export", f"--model={tmp_path / 'imported'}", f"--workdir={tmp_path / 'exported'}"]
    exporting += [f"--max-shard-gb={SHARD / 1e9}", "--no-verify"]
    peaks = [conversion.limited(words, int(4e9))[1] for words in (importing, exporting)]
    assert max(peaks) < LIMIT
    with Tensors(tmp_path / "exported") as tensors:
        assert not differing(tensors, random, random.template, conversion.DTYPE)
