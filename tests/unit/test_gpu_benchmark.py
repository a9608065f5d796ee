"""The benchmark of one GPU: every part runs here at a tiny size, and its shapes fill a device without overflowing."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import profile_steps
import pytest
import shapes

ROOT = Path(__file__).parents[2]


def test_every_part_runs_and_a_second_call_repeats_none(tmp_path: Path):
    command = [str(ROOT / "benchmarks" / "gpu.sh"), "--smoke", "--out", str(tmp_path)]
    environment = os.environ | {"PYTHON": sys.executable, "JAX_PLATFORMS": "cpu"}
    first = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    found = json.loads((tmp_path / "gpu.json").read_text())
    assert found["skipped"] == {}
    assert set(found["results"]) == {"attention", "peak", "decode smoke 256", "step smoke 256", "peer smoke 256"}
    assert all(one["error"] < 0.01 for one in found["results"]["attention"])
    for name in ("step", "peer"):
        assert [one["documents"] for one in found["results"][f"{name} smoke 256"]] == list(shapes.DOCUMENTS)
        assert all(one["tokens_per_s"] > 0 for one in found["results"][f"{name} smoke 256"])
    assert [one["alone_says_the_same"] for one in found["results"]["decode smoke 256"]] == [True]
    report = (tmp_path / "gpu.md").read_text()
    assert "| smoke | 2 | 256 | 16 |" in report
    assert "Where a step goes: smoke" in report
    assert report in first.stdout
    second = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert second.stdout.count("measured before") == 5


def test_a_part_without_its_device_or_its_time_is_skipped_with_the_reason(tmp_path: Path):
    environment = os.environ | {"PYTHON": sys.executable, "JAX_PLATFORMS": "cpu"}
    for budget, reason in (("570", "finds no NVIDIA GPU here"), ("0", "no time was left")):
        command = [str(ROOT / "benchmarks" / "gpu.sh"), "--out", str(tmp_path), "--budget-s", budget]
        subprocess.run([*command, "--rows", "8192"], env=environment, capture_output=True, check=True)
        skipped = json.loads((tmp_path / "gpu.json").read_text())["skipped"]
        assert len(skipped) == 9
        assert all(why.endswith(reason) for why in skipped.values())


@pytest.mark.parametrize("model", shapes.MODELS)
@pytest.mark.parametrize("row_tokens", shapes.ROWS)
def test_a_model_is_as_deep_as_fits(model: str, row_tokens: int):
    memory = 79 * shapes.GIB
    case = shapes.case(model, row_tokens, memory)
    own = shapes.MODELS[model]["num_hidden_layers"]
    assert 12 <= case.layers <= own
    assert shapes._needed(case) < 0.85 * memory
    if case.layers < own:
        assert shapes.case(model, row_tokens, 10 * memory).layers == own


@pytest.mark.parametrize("documents", shapes.DOCUMENTS)
def test_documents_fill_the_row(documents: int):
    lengths = shapes.lengths(8192, documents)
    assert sum(lengths) == 8192
    assert len(set(lengths)) == documents
    row = shapes.row(shapes.case("smoke", 8192, shapes.GIB).architecture(), 8192, documents)
    assert row.segments.max() == documents
    assert np.mean(row.lengths) == pytest.approx(shapes.attended(8192, documents))
    assert row.weights.min() == 1


def test_losses_are_what_is_spent_beyond_the_ideal():
    assert profile_steps.kind_of("nvjet_sm90_tst_128x256_64x4_2x1_v_bz_coopB_NNT") == "matrix products"
    assert profile_steps.kind_of("cudnn_generated_fort_native_sdpa_sm90_flash_bprop_wgmma") == "attention"
    assert profile_steps.kind_of("loop_multiply_fusion_12") == "all else"
    profile = {"by_kind_s": {"matrix products": 0.5, "attention": 0.35, "all else": 0.2}, "waiting_s": 0.04}
    lost = profile_steps.losses(profile, {"matrix products": 0.45, "attention": 0.1})
    assert lost == [
        ("attention", pytest.approx(0.25)),
        ("all else", pytest.approx(0.2)),
        ("matrix products", pytest.approx(0.05)),
        ("waiting", pytest.approx(0.04)),
    ]
