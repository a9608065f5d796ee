"""Rows and manifests: what is written is read back, malformed input is named, interrupted writes leave no half file."""

import dataclasses
import hashlib
import json
import subprocess
import sys
import tempfile
import typing
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxdistill import manifest
from jaxdistill.errors import UserError
from jaxdistill.records import (
    Chain,
    Completion,
    Example,
    Label,
    Problem,
    Score,
    Usage,
    Verdict,
    from_dict,
    read_json_objects,
    read_jsonl,
    to_json,
    write_jsonl,
)

# Rows as parsed JSON: a strategy that built rows would run beartype's random sampling inside hypothesis.
TEXT = st.text(max_size=30)
COUNT = st.integers(0, 10**9)
FINITE = st.floats(allow_nan=False, allow_infinity=False)
JSON = st.recursive(
    st.none() | st.booleans() | COUNT | FINITE | TEXT, lambda inner: st.lists(inner, max_size=3), max_leaves=4
)
META = st.dictionaries(TEXT, JSON, max_size=3)
MESSAGES = st.lists(st.dictionaries(TEXT, TEXT, max_size=3), max_size=3)
VERDICT = st.fixed_dictionaries(
    {"label": st.sampled_from(typing.get_args(Label)), "rule": TEXT, "extracted": st.none() | TEXT}
)
USAGE = st.fixed_dictionaries({field.name: COUNT for field in dataclasses.fields(Usage)})
ROWS = {
    Problem: st.fixed_dictionaries(
        {
            "id": TEXT,
            "problem": TEXT,
            "answer": st.none() | TEXT,
            "solution": st.none() | TEXT,
            "source": TEXT,
            "licence": TEXT,
            "language": TEXT,
            "meta": META,
        }
    ),
    Chain: st.fixed_dictionaries(
        {
            "id": TEXT,
            "problem_id": TEXT,
            "messages": MESSAGES,
            "reasoning_kind": st.sampled_from(["full", "summary", "answer_only", "synthesized"]),
            "teacher": TEXT,
            "prompt_hash": TEXT,
            "request_id": TEXT,
            "sample_index": COUNT,
            "finish_reason": st.sampled_from(["stop", "length", "content_filter"]),
            "usage": USAGE,
            "cost_usd": FINITE,
            "verdict": VERDICT,
            "created": FINITE,
            "prompt": TEXT,
            "latency_s": FINITE,
            "flags": st.lists(TEXT, max_size=3),
        }
    ),
    Example: st.fixed_dictionaries(
        {"id": TEXT, "messages": MESSAGES, "weight": FINITE, "provenance": st.lists(TEXT, max_size=3)}
    ),
    Completion: st.fixed_dictionaries(
        {
            "id": TEXT,
            "task": TEXT,
            "item_id": TEXT,
            "sample_index": COUNT,
            "seed": COUNT,
            "settings": META,
            "text": TEXT,
            "thinking_tokens": COUNT,
            "answer_tokens": COUNT,
            "finish_reason": st.sampled_from(["stop", "length"]),
        }
    ),
    Score: st.fixed_dictionaries(
        {
            "completion_id": TEXT,
            "verdict": VERDICT,
            "grader": TEXT,
            "points": st.none() | st.floats(0, 1),
            "judge": st.dictionaries(TEXT, TEXT, max_size=2),
        }
    ),
}

CHAIN = Chain(
    id="p/0",
    problem_id="p",
    messages=({"role": "user", "content": "1 + 1?"}, {"role": "assistant", "content": "2", "reasoning_content": "..."}),
    reasoning_kind="full",
    teacher="local",
    prompt_hash="0" * 64,
    request_id="r",
    sample_index=0,
    finish_reason="stop",
    usage=Usage(prompt_tokens=4, output_tokens=9, reasoning_tokens=3),
    cost_usd=0.5,
    verdict=Verdict(label="correct", rule="integer", extracted="2"),
    created=1.5,
)


def changed(row: Any, **values: Any) -> dict[str, Any]:
    """A row as parsed JSON, with some values replaced."""
    return {**json.loads(to_json(row)), **values}


# --- rows there and back ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("row_type", ROWS)
@settings(deadline=None)
@given(data=st.data())
def test_a_row_is_one_line_and_comes_back_equal(row_type: type, data: st.DataObject):
    values = data.draw(ROWS[row_type])
    row = from_dict(values, row_type, where="here")
    line = to_json(row)
    assert "\n" not in line
    assert json.loads(line) == values
    assert from_dict(json.loads(line), row_type, where="here") == row


@pytest.mark.parametrize("row_type", ROWS)
@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_a_file_of_rows_comes_back_equal(row_type: type, data: st.DataObject):
    values = data.draw(st.lists(ROWS[row_type], max_size=4))
    rows = [from_dict(value, row_type, where="here") for value in values]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.jsonl"
        assert write_jsonl(path, rows) == len(rows)
        assert list(read_jsonl(path, row_type)) == rows


def test_every_field_is_in_the_file_so_that_other_tools_see_it():
    written = json.loads(to_json(Problem(id="p", problem="?")))
    assert written.keys() == {field.name for field in dataclasses.fields(Problem)}
    assert written["meta"] == {}


def test_lists_of_a_row_become_tuples():
    row = from_dict(changed(CHAIN), Chain, where="here")
    assert row == CHAIN
    assert isinstance(row.messages, tuple)


def test_fields_with_a_default_may_be_absent():
    assert from_dict({"id": "p", "problem": "?"}, Problem, where="here") == Problem(id="p", problem="?")


def test_an_integer_is_read_as_a_float_where_one_is_expected():
    row = from_dict(changed(CHAIN, cost_usd=1), Chain, where="here")
    assert isinstance(row.cost_usd, float)


def test_empty_lines_are_skipped_and_counted(tmp_path: Path):
    path = tmp_path / "rows.jsonl"
    path.write_text('\n{"a": 1}\n  \n{"b": 2}')
    assert list(read_json_objects(path)) == [(2, {"a": 1}), (4, {"b": 2})]


# --- malformed input -------------------------------------------------------------------------------------------------


def test_a_missing_file_is_named(tmp_path: Path):
    with pytest.raises(UserError, match=r"absent\.jsonl: no such file; expected a JSON Lines file"):
        list(read_jsonl(tmp_path / "absent.jsonl", Problem))


@pytest.mark.parametrize(
    "line",
    [b'{"id": "b", "problem": ', b"not json", b'{"id": "b"} {}', b'{"id": "\xff"}'],
    ids=["cut off", "no JSON", "two objects", "not UTF-8"],
)
def test_a_malformed_line_is_named_after_the_good_rows_were_read(line: bytes, tmp_path: Path):
    path = tmp_path / "problems.jsonl"
    path.write_bytes(b'{"id": "a", "problem": "?"}\n' + line + b"\n")
    rows = read_jsonl(path, Problem)
    assert next(rows).id == "a"
    with pytest.raises(UserError, match=r"problems\.jsonl:2: not valid JSON .*expected one object a line"):
        next(rows)


@pytest.mark.parametrize("line", ["[]", '"text"', "3", "null"])
def test_a_line_that_is_no_object_is_named(line: str, tmp_path: Path):
    path = tmp_path / "problems.jsonl"
    path.write_text(line)
    with pytest.raises(UserError, match=r"problems\.jsonl:1: found a JSON \w+, expected an object"):
        list(read_jsonl(path, Problem))


def test_all_missing_and_unknown_keys_are_named_at_once(tmp_path: Path):
    path = tmp_path / "problems.jsonl"
    path.write_text('{"anwser": "4", "questoin": "2 + 2?"}')
    with pytest.raises(UserError) as caught:
        list(read_jsonl(path, Problem))
    message = str(caught.value)
    assert "problems.jsonl:1: not a Problem" in message
    assert "missing fields ['id', 'problem'], unknown fields ['anwser', 'questoin']" in message
    assert "optionally ['answer'" in message


def test_a_key_unknown_to_a_nested_row_is_an_error():
    usage = {"prompt_tokens": 1, "completion_tokens": 2}
    with pytest.raises(UserError, match=r"here: usage: not a Usage.*unknown fields \['completion_tokens'\]"):
        from_dict(changed(CHAIN, usage=usage), Chain, where="here")


@pytest.mark.parametrize(
    ("field", "value", "complaint"),
    [
        ("id", 7, "here: id: found 7, expected str"),
        ("id", None, "here: id: found None, expected str"),
        ("sample_index", "0", "here: sample_index: found '0', expected int"),
        ("sample_index", 0.0, "here: sample_index: found 0.0, expected int"),
        ("sample_index", True, "here: sample_index: found True, expected int"),
        ("cost_usd", True, "here: cost_usd: found True, expected float"),
        ("finish_reason", "eos", "here: finish_reason: found 'eos', expected one of ['stop', 'length'"),
        ("messages", "text", "here: messages: found 'text', expected"),
        ("messages", [{"role": "user"}, {"role": None}], "here: messages[1].role: found None, expected str"),
        ("usage", 3, "here: usage: found 3, expected Usage"),
        ("verdict", {"label": "right", "rule": ""}, "here: verdict: label: found 'right', expected one of"),
    ],
)
def test_a_wrong_type_is_named_with_its_place(field: str, value: Any, complaint: str):
    with pytest.raises(UserError) as caught:
        from_dict(changed(CHAIN, **{field: value}), Chain, where="here")
    assert str(caught.value).startswith(complaint)


def test_a_long_wrong_value_is_cut_in_the_message():
    with pytest.raises(UserError) as caught:
        from_dict({"id": ["x" * 10_000], "problem": "?"}, Problem, where="here")
    assert len(str(caught.value)) < 200


# --- interrupted writes ----------------------------------------------------------------------------------------------


def failing_rows() -> typing.Iterator[Problem]:
    yield Problem(id="new", problem="?")
    raise RuntimeError("the disk is full")


def test_a_failed_write_leaves_no_file(tmp_path: Path):
    with pytest.raises(RuntimeError, match="disk is full"):
        write_jsonl(tmp_path / "rows.jsonl", failing_rows())
    assert not (tmp_path / "rows.jsonl").exists()


def test_a_failed_write_leaves_the_old_file_and_the_next_one_succeeds(tmp_path: Path):
    path = tmp_path / "folder" / "rows.jsonl"
    old, new = [Problem(id="old", problem="?")], [Problem(id="new", problem="?")] * 2
    write_jsonl(path, old)
    with pytest.raises(RuntimeError, match="disk is full"):
        write_jsonl(path, failing_rows())
    assert list(read_jsonl(path, Problem)) == old
    write_jsonl(path, new)
    assert list(read_jsonl(path, Problem)) == new
    assert [file.name for file in path.parent.iterdir()] == ["rows.jsonl"]


def test_a_killed_write_leaves_the_old_file(tmp_path: Path):
    path = tmp_path / "rows.jsonl"
    old = [Problem(id="old", problem="?")]
    write_jsonl(path, old)
    program = f"""
import os, signal
from jaxdistill.records import Problem, write_jsonl
def rows():
    for number in range(1_000_000):
        if number == 5_000:  # several buffers are on disk by then
            os.kill(os.getpid(), signal.SIGKILL)
        yield Problem(id=str(number), problem="x" * 100)
write_jsonl({str(path)!r}, rows())
"""
    assert subprocess.run([sys.executable, "-c", program], timeout=120).returncode == -9
    assert path.with_name("rows.jsonl.partial").stat().st_size > 0
    assert list(read_jsonl(path, Problem)) == old


def test_json_that_cannot_be_written_leaves_the_old_file(tmp_path: Path):
    circle: list[Any] = []
    circle.append(circle)
    manifest.write_json(tmp_path / "config.json", {"old": 1})
    with pytest.raises(ValueError, match="Circular"):
        manifest.write_json(tmp_path / "config.json", circle)
    assert json.loads((tmp_path / "config.json").read_text()) == {"old": 1}


# --- manifests -------------------------------------------------------------------------------------------------------


def test_a_manifest_tells_inputs_versions_commit_and_counts(tmp_path: Path):
    data, folder = tmp_path / "in.jsonl", tmp_path / "model"
    data.write_bytes(b"{}\n")
    (folder / "sub").mkdir(parents=True)
    (folder / "sub" / "weights").write_bytes(b"12345")
    inputs = [data, folder, tmp_path / "absent"]
    manifest.write_manifest(tmp_path / "run", "collect", inputs, {"kept": 3}, cost_usd=0.25)

    written = json.loads((tmp_path / "run" / "manifest.json").read_text())
    assert written["schema"] == 1
    assert written["command"] == "collect"
    assert written["counts"] == {"kept": 3}
    assert written["cost_usd"] == 0.25
    assert written["inputs"] == {
        str(data): "sha256:" + hashlib.sha256(b"{}\n").hexdigest(),
        str(folder): {"sub/weights": 5},
        str(tmp_path / "absent"): "missing",
    }
    assert written["versions"].keys() >= {"python", "jaxdistill", "jax"}
    assert written["commit"] == manifest.commit()


def test_a_configuration_is_written_with_its_nested_parts(tmp_path: Path):
    manifest.write_config(tmp_path / "run", CHAIN)
    written = json.loads((tmp_path / "run" / "config.json").read_text())
    assert written["usage"] == {"prompt_tokens": 4, "output_tokens": 9, "reasoning_tokens": 3, "cached_tokens": 0}
    assert len(written["messages"]) == 2


def test_commit_is_unknown_outside_a_checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(manifest, "__file__", str(tmp_path / "manifest.py"))
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert manifest.commit() == "unknown"


def test_commit_tells_local_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def git(*words: str) -> None:
        subprocess.run(["git", "-c", "user.name=t", "-c", "user.email=t@t", *words], cwd=tmp_path, check=True)

    (tmp_path / "file").write_text("one")
    git("init", "-q")
    git("add", "file")
    git("commit", "-qm", "first")
    monkeypatch.setattr(manifest, "__file__", str(tmp_path / "manifest.py"))
    (tmp_path / "manifest.py").write_text("")
    assert manifest.commit() == "unknown", "a package installed inside another project's checkout"
    git("add", "manifest.py")
    git("commit", "-qm", "second")
    clean = manifest.commit()
    assert len(clean) == 40
    (tmp_path / "file").write_text("two")
    assert manifest.commit() == clean + "+changes"
