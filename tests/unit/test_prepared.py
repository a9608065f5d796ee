"""Tokenized examples on disk: what is read back, what is done again and what is not, and what is wrong with a file."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import tiny

from jaxdistill import array_records, parquet, records
from jaxdistill.data import chat, loader, prepared
from jaxdistill.errors import UserError
from jaxdistill.records import Example

VOCAB = 264


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory):
    hf = tiny.hf_config("qwen2", vocab_size=VOCAB)
    c = tiny.config("qwen2", vocab_size=VOCAB)
    folder = tmp_path_factory.mktemp("model") / "hf"
    return chat.load_tokenizer(tiny.write_folder(folder, hf, tiny.values(c), c, with_tokenizer=True))


def parts_of(cache: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in cache.rglob("*.safetensors")}


def read(path: Path, tokenizer: object, cache: Path) -> prepared.Documents:
    return prepared.prepare(path, tokenizer, cache, show_progress=False)[0]


def test_what_is_read_back_is_what_the_template_makes(tmp_path: Path, tokenizer: object):
    path = tiny.write_examples(tmp_path / "examples.jsonl", 9, weight=0.1)
    found = read(path, tokenizer, tmp_path / "cache")
    expected = [chat.tokenize(tokenizer, example) for example in records.read_jsonl(path, Example)]
    assert len(found) == len(expected) == 9
    for a, b in zip(found, expected, strict=True):
        assert (a.id, a.weight) == (b.id, b.weight)
        np.testing.assert_array_equal(a.tokens, b.tokens)
        np.testing.assert_array_equal(a.trained, b.trained)
    assert found.lengths.tolist() == [len(d.tokens) - 1 for d in expected]
    assert found.trained_tokens.tolist() == [d.trained[1:].sum() for d in expected]
    assert found[-1].id == found.id_of(-1) == expected[-1].id
    assert found.largest[0] == max(int(d.tokens.max()) for d in expected)
    with pytest.raises(IndexError):
        found[9]


def test_several_processes_make_the_same_parts_as_one(
    tmp_path: Path, tokenizer: object, monkeypatch: pytest.MonkeyPatch
):
    path = tiny.write_examples(tmp_path / "examples.jsonl", 40)
    whole = read(path, tokenizer, tmp_path / "whole")
    monkeypatch.setattr(prepared, "PART_BYTES", path.stat().st_size // 3)
    found = read(path, tokenizer, tmp_path / "parts")
    assert len(parts_of(tmp_path / "parts")) == 3
    assert [d.id for d in found] == [d.id for d in whole]
    assert all(np.array_equal(a.tokens, b.tokens) for a, b in zip(found, whole, strict=True))
    lost = sorted(parts_of(tmp_path / "parts"))[1]
    lost.unlink()  # as if it had been killed before
    before = parts_of(tmp_path / "parts")
    assert read(path, tokenizer, tmp_path / "parts").digest == found.digest
    assert {p: t for p, t in parts_of(tmp_path / "parts").items() if p != lost} == before, "only what is lost is done"


def test_nothing_is_done_twice_for_the_same_content(tmp_path: Path, tokenizer: object):
    path, cache = tiny.write_examples(tmp_path / "examples.jsonl", 9), tmp_path / "cache"
    first = read(path, tokenizer, cache)
    before = parts_of(cache)
    os.utime(path)  # touched: looked at again, and the same
    (tmp_path / "copies").mkdir()
    copy = tmp_path / "copies" / "examples.jsonl"
    copy.write_bytes(path.read_bytes())
    assert read(path, tokenizer, cache).digest == read(copy, tokenizer, cache).digest == first.digest
    assert parts_of(cache) == before
    path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:5]))
    assert len(read(path, tokenizer, cache)) == 5


def test_rows_are_packed_once_for_each_length(tmp_path: Path, tokenizer: object):
    path, cache = tiny.write_examples(tmp_path / "examples.jsonl", 30), tmp_path / "cache"
    sets = [loader.prepare(path, tokenizer, tokens, VOCAB, cache, show_progress=False) for tokens in (64, 128, 64)]
    assert sets[0].fingerprint() == sets[2].fingerprint() != sets[1].fingerprint()
    assert len(list(cache.rglob("*.packed"))) == 2
    ids = sorted(name for i in range(len(sets[1])) for name in sets[1].ids(i))
    assert ids == sorted(d.id for d in sets[1].documents)
    assert sets[1].documents_of_fullest_row == max(len(sets[1].ids(i)) for i in range(len(sets[1])))


def test_all_that_is_wrong_is_named_at_once_or_left_out_and_named(tmp_path: Path, tokenizer: object):
    path = tiny.write_examples(tmp_path / "examples.jsonl", 4)
    good = path.read_text(encoding="utf-8").splitlines()
    silent = json.dumps({"id": "mute", "messages": [{"role": "user", "content": "well?"}]})
    path.write_text("\n".join([good[0], '{"id": ', "", good[1], silent, *["[]"] * 20]) + "\n", encoding="utf-8")
    cache = tmp_path / "cache"
    with pytest.raises(UserError) as caught:
        read(path, tokenizer, cache)
    message = str(caught.value)
    assert "22 examples cannot be used" in message
    assert f"{path}:2: not valid JSON" in message
    assert f"{path}:5: example mute has no assistant words" in message
    assert f"{path}:6: found a JSON list" in message
    assert "... and 12 more" in message
    before = parts_of(cache)
    found = prepared.prepare(path, tokenizer, cache, show_progress=False, bad_rows="skip").documents
    assert [d.id for d in found] == ["e0", "e1"]
    assert [number for number, _ in found.wrong] == [2, 5, *range(6, 26)]
    with pytest.raises(UserError, match="22 examples cannot be used"):  # what was left out once is not forgotten
        read(path, tokenizer, cache)
    assert parts_of(cache) == before
    clean = tmp_path / "clean.jsonl"
    clean.write_text("\n".join(good[:2]), encoding="utf-8")
    assert read(clean, tokenizer, cache).digest == found.digest, "a run goes on where its file was mended so"
    path.write_text("[]\n", encoding="utf-8")
    with pytest.raises(UserError, match=r"examples.jsonl:1: found a JSON list.*\nmend them"):
        prepared.prepare(path, tokenizer, cache, show_progress=False, bad_rows="skip")


@pytest.mark.parametrize("group", [1, 4])
def test_array_records_are_read_by_records_and_damaged_ones_are_named(
    tmp_path: Path, tokenizer: object, monkeypatch: pytest.MonkeyPatch, group: int
):
    lines = tiny.write_examples(tmp_path / "examples.jsonl", 30)
    path, cache = tmp_path / "examples.array_record", tmp_path / "cache"
    tiny.write_array_records(path, lines.read_bytes().splitlines(), f"group_size:{group},uncompressed")
    monkeypatch.setattr(array_records, "_AT_ONCE", 7)
    expected, found = read(lines, tokenizer, cache), read(path, tokenizer, cache)
    assert found.digest == expected.digest
    monkeypatch.setattr(prepared, "PART_BYTES", path.stat().st_size // 3 + 1)
    stretches = [stretch for stretch, _ in prepared.plan(path, tokenizer, tmp_path / "other")[0]]
    assert [(s.start, s.stop, s.line) for s in stretches] == [(0, 10, 1), (10, 20, 11), (20, 30, 21)]

    content = path.read_bytes()
    place = content.index(b'"e17"')
    path.write_bytes(content[:place] + b"X" + content[place + 1 :])
    monkeypatch.setattr(prepared, "PART_BYTES", 2**25)
    found = prepared.prepare(path, tokenizer, cache, show_progress=False, bad_rows="skip").documents
    lost = [n for n in range(1, 31) if (n - 1) // group == 17 // group]
    assert [number for number, _ in found.wrong] == lost
    assert found.wrong[0][1].startswith("damaged record (")
    assert [d.id for d in found] == [f"e{i}" for i in range(30) if i + 1 not in lost]
    path.write_bytes(b"no such format" * 1000)
    with pytest.raises(UserError, match="not an ArrayRecord file"):
        read(path, tokenizer, cache)


def test_parquet_is_read_by_row_groups(tmp_path: Path, tokenizer: object, monkeypatch: pytest.MonkeyPatch):
    path = tiny.write_examples(tmp_path / "examples.jsonl", 30)
    other = tmp_path / "examples.parquet"
    monkeypatch.setattr(parquet, "_GROUP", 7)
    parquet.write(other, records.read_jsonl(path, Example), Example)
    monkeypatch.setattr(prepared, "PART_BYTES", sum(size for _, size in parquet.groups(other)[:2]) - 1)
    expected, found = read(path, tokenizer, tmp_path / "cache"), read(other, tokenizer, tmp_path / "cache")
    assert [d.id for d in found] == [d.id for d in expected]
    assert all(np.array_equal(a.tokens, b.tokens) for a, b in zip(found, expected, strict=True))
    stretches = [stretch for stretch, _ in prepared.plan(other, tokenizer, tmp_path / "cache")[0]]
    assert [(s.start, s.stop, s.line) for s in stretches] == [(0, 2, 1), (2, 4, 15), (4, 5, 29)]


def test_rows_of_a_damaged_row_group_are_named(tmp_path: Path, tokenizer: object, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "examples.parquet"
    monkeypatch.setattr(parquet, "_GROUP", 10)
    lines = tiny.write_examples(tmp_path / "examples.jsonl", 30)
    parquet.write(path, records.read_jsonl(lines, Example), Example)
    start = parquet.check_installed("").parquet.ParquetFile(path).metadata.row_group(1).column(0).data_page_offset
    content = path.read_bytes()
    path.write_bytes(content[:start] + b"\xff" * 12 + content[start + 12 :])
    found = prepared.prepare(path, tokenizer, tmp_path / "cache", show_progress=False, bad_rows="skip").documents
    assert [number for number, _ in found.wrong] == list(range(11, 21))
    assert found.wrong[0][1].startswith("damaged row group (")
    assert [d.id for d in found] == [f"e{i}" for i in range(30) if i // 10 != 1]


def test_a_file_without_examples(tmp_path: Path, tokenizer: object):
    (tmp_path / "examples.jsonl").touch()
    with pytest.raises(UserError, match="is empty; expected an example on each line"):
        read(tmp_path / "examples.jsonl", tokenizer, tmp_path / "cache")
    with pytest.raises(UserError, match="no such file"):
        read(tmp_path / "nowhere.jsonl", tokenizer, tmp_path / "cache")
