"""Chains as Parquet: the same rows as in JSON Lines, read wherever those are, and by `datasets`."""

import dataclasses
import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
import rows
from test_collect_failures import config_for

from jaxdistill import parquet
from jaxdistill.collect.run import main
from jaxdistill.curate import examples, mix
from jaxdistill.errors import UserError
from jaxdistill.local_teacher.answers import Faults
from jaxdistill.local_teacher.app import TeacherOptions
from jaxdistill.local_teacher.server import running_teacher
from jaxdistill.records import Chain, read_jsonl, write_jsonl

HERE = importlib.util.find_spec("pyarrow") is not None
needs_pyarrow = pytest.mark.skipif(not HERE, reason="the optional package pyarrow is not installed")


@needs_pyarrow
def test_chains_come_back_as_they_were(tmp_path: Path):
    messages = (
        {"role": "user", "content": "2 + 2?"},
        {"role": "assistant", "content": "4 四", "reasoning_content": "2"},
    )
    chains = [rows.chain(id=str(i), messages=messages[i % 2 :], flags=("two_answers",) * (i % 2)) for i in range(2500)]
    path = tmp_path / "chains.parquet"
    assert parquet.write(path, chains, Chain) == 2500
    assert list(read_jsonl(path, Chain)) == chains
    assert parquet.write(path, [], Chain) == 0
    assert list(read_jsonl(path, Chain)) == []
    half = rows.chain(messages=({"role": "assistant", "content": "\ud83d \U0001f600"},))
    parquet.write(path, [half], Chain)
    assert next(read_jsonl(path, Chain)).messages[0]["content"] == "\ufffd \U0001f600"


@needs_pyarrow
def test_what_is_no_parquet_is_named(tmp_path: Path):
    path = tmp_path / "chains.parquet"
    path.write_text('{"id": "a"}\n')
    with pytest.raises(UserError, match=r"chains\.parquet: not a Parquet file"):
        list(read_jsonl(path, Chain))
    with pytest.raises(UserError, match="expected JSON Lines of examples on a disk"):
        mix.main(mix.MixConfig(examples=(path,), workdir=tmp_path / "mixed"))


@needs_pyarrow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_collect_writes_both_and_datasets_loads_both(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    datasets = pytest.importorskip("datasets", reason="the optional package datasets is not installed")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    loaded, made = {}, {}
    with running_teacher(TeacherOptions(faults=Faults(wrong=0.2))) as base_url:
        config = config_for(tmp_path, base_url, count=20)
        for name in ("jsonl", "parquet"):
            main(dataclasses.replace(config, chains_format=name))
            path = config.workdir / f"chains.{name}"
            assert [p.name for p in config.workdir.glob("chains.[jp]*")] == [path.name]  # no older one beside it
            builder = "json" if name == "jsonl" else name
            loaded[name] = datasets.load_dataset(builder, data_files=str(path), split="train").to_list()
            folder = tmp_path / name
            examples.main(examples.ExamplesConfig(chains=path, workdir=folder))
            made[name] = (folder / "examples.jsonl").read_bytes()
    assert made["jsonl"] == made["parquet"]
    assert 10 < len(loaded["jsonl"]) < 20
    for ours, theirs in zip(loaded["jsonl"], loaded["parquet"], strict=True):
        assert ours.pop("messages")[-1] == theirs.pop("messages")[-1]
        assert ours == theirs


def test_without_pyarrow_it_says_how_to_install_it_before_anything_is_asked(tmp_path: Path):
    write_jsonl(tmp_path / "problems.jsonl", [{"id": "a", "problem": "1 + 1?", "answer": "2"}])
    program = f"""
import sys
sys.modules["pyarrow"] = None  # as where it is not installed
from jaxdistill import cli
cli.main(["collect", "--problems={tmp_path}/problems.jsonl", "--workdir={tmp_path}/run", "--chains-format=parquet",
          "--teacher.base-url=http://127.0.0.1:9/v1"])
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert done.returncode == 2, done.stderr
    assert "pip install 'jaxdistill[parquet]'" in done.stderr
    assert not (tmp_path / "run").exists()
