"""Problems that `datasets` loads: from a folder, since tests reach no hub."""

import json
import sys
from pathlib import Path

import pytest

from jaxdistill.errors import UserError
from jaxdistill.evaluate import hub, tasks


def test_names_of_no_set_are_refused(tmp_path: Path):
    for name in ("openai/gsm8k", ":test", ""):
        with pytest.raises(UserError, match=r"expected OWNER/NAME:SPLIT"):
            hub.fetch(name, tmp_path / "rows.jsonl")


def test_without_datasets_it_says_how_to_install_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "datasets", None)  # as where it is not installed
    with pytest.raises(UserError, match=r"pip install 'jaxdistill\[hub\]'"):
        hub.fetch("openai/gsm8k/main:test", tmp_path / "rows.jsonl")


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_folder_is_read_as_a_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    datasets = pytest.importorskip("datasets", reason="the optional package datasets is not installed")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "set"
    folder.mkdir()
    rows = [{"question": f"{i} + 1?", "answer": f"It is one more.\n#### {i + 1}"} for i in range(3)]
    (folder / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    path = tmp_path / "hub-set.jsonl"
    hub.fetch(f"{folder}:test", path)
    problems = tasks.task("gsm8k").problems_from(path)
    assert [(problem.problem, problem.answer) for problem in problems] == [(f"{i} + 1?", str(i + 1)) for i in range(3)]
    (folder / "test.jsonl").unlink()
    hub.fetch(f"{folder}:test", path)  # what was fetched stays
    with pytest.raises(UserError, match="datasets cannot load"):
        hub.fetch(f"{tmp_path / 'cache'}:validation", tmp_path / "other.jsonl")
