"""A malformed line is told with file and number, counted and left out by every stage; --strict ends the command."""

import contextlib
import json
from pathlib import Path
from typing import Any

import pytest
import rows

from jaxdistill import cli
from jaxdistill.local_teacher.problems import generate
from jaxdistill.local_teacher.server import running_teacher
from jaxdistill.records import Example, to_json

WORDS = "and so we add the numbers up, and wait for the sum. " * 20
EXAMPLES = [
    Example(id=f"e{i}", messages=({"role": "user", "content": "?"}, {"role": "assistant", "content": WORDS}))
    for i in range(4)
]
BAD = ["{half", '["a list"]', '{"id": "x", "words": 1}', '{"id": "x", "messages": []}']
STAGES = {
    "curate": ("inputs", "problems.jsonl"),
    "refine import": ("inputs", "examples.jsonl"),
    "refine select": ("examples", "examples.jsonl"),
    "refine mix": ("examples", "examples.jsonl"),
    "examples": ("chains", "examples.jsonl"),
}


def good(stage: str) -> list[str]:
    if stage == "examples":
        return [to_json(rows.chain(id=f"c{i}")) for i in range(4)]
    if stage in ("curate", "refine import"):
        return [json.dumps({"id": f"p{i}", "problem": f"What is {i} + {i}?", "answer": f"{2 * i}"}) for i in range(4)]
    return [to_json(one) for one in EXAMPLES]


def run(stage: str, path: Path, *options: str) -> int:
    """The exit code of a command line."""
    try:
        cli.main([*stage.split(), f"--{STAGES[stage][0]}", str(path), "--workdir", str(path.parent / "run"), *options])
    except SystemExit as ended:
        return int(ended.code or 0)
    return 0


@pytest.mark.parametrize("stage", ["curate", "refine select", "refine mix", "examples"])
def test_malformed_lines_are_told_and_left_out(stage: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    lines, path = good(stage), tmp_path / "rows.jsonl"
    bad = BAD[:2] if stage == "curate" else BAD  # which reads rows of any shape
    path.write_text("\n".join([*lines[:2], *bad, "", *lines[2:]]) + "\n")
    assert run(stage, path) == 0
    said = capsys.readouterr().err
    for number in range(3, 3 + len(bad)):
        assert f"malformed: {path}:{number}: " in said
    counts = json.loads((tmp_path / "run" / "manifest.json").read_text())["counts"]
    assert counts["malformed"] == len(bad)
    kept = (tmp_path / "run" / STAGES[stage][1]).read_text().splitlines()
    assert len(kept) == 4 == next(iter(counts.values()))
    assert run(stage, path, "--strict") == 2
    assert f"{path}:3: malformed: not valid JSON" in capsys.readouterr().err


def test_of_many_malformed_lines_the_first_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join([*good("refine mix"), *["{"] * 500]))
    assert run("refine mix", path) == 0
    assert capsys.readouterr().err.count("malformed:") == 11
    assert json.loads((tmp_path / "run" / "manifest.json").read_text())["counts"]["malformed"] == 500


NOTHING: dict[str, tuple[list[Any], tuple[str, ...], str]] = {
    "curate": ([{"problem": "Prove it.", "answer": "1"}] * 3 + [{"x": 1}], (), "3 proof, 1 unknown_shape; "),
    "refine import": ([{"problem": "What is 1 + 1?"}] * 3, (), "3 no_response; "),
    "refine select": (good("refine select"), ("--least-tokens", "100000"), "4 too_short"),
    "refine mix": (good("refine mix"), ("--pairs",), "4 without_pair"),
}


@pytest.mark.parametrize("stage", NOTHING)
def test_a_stage_that_keeps_nothing_fails_and_says_why(stage: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    values, options, why = NOTHING[stage]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(f"{one if isinstance(one, str) else json.dumps(one)}\n" for one in values))
    assert run(stage, path, *options) == 1
    assert f"nothing was kept, most often because of: {why}" in capsys.readouterr().err
    assert (tmp_path / "run" / STAGES[stage][1]).read_text() == ""


ASKING = {
    "collect": ("problems", "chains.jsonl"),
    "refine reformat": ("problems", "examples.jsonl"),
    "refine translate": ("examples", "examples.jsonl"),
}


@pytest.mark.parametrize("stage", ASKING)
def test_a_malformed_line_ends_no_stage_that_asks(stage: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """It has a receipt and the run goes on; --strict refuses before anything is asked or written."""
    option, kept = ASKING[stage]
    path, workdir = tmp_path / "rows.jsonl", tmp_path / "run"
    lines = [
        to_json(one) for one in (EXAMPLES if option == "examples" else generate("turns", 4, seed=0, split="train"))
    ]
    path.write_text("\n".join([lines[0], *BAD[:3], *lines[1:]]) + "\n")
    with running_teacher() as base_url:
        words = [*stage.split(), f"--{option}", str(path), "--workdir", str(workdir), "--teacher.base-url", base_url]
        with pytest.raises(SystemExit) as refused:
            cli.main([*words, "--strict"])
        assert refused.value.code == 2
        assert f"{path}:2: malformed: not valid JSON" in capsys.readouterr().err
        assert not workdir.exists()
        speaks = contextlib.nullcontext() if stage != "refine translate" else pytest.raises(SystemExit)  # no Chinese
        with speaks:
            cli.main(words)
    assert f"malformed: {path}:2: not valid JSON" in capsys.readouterr().err
    counts = json.loads((workdir / "manifest.json").read_text())["counts"]
    assert (counts["malformed"], sum(counts.values())) == (3, 7)
    receipts = [json.loads(line) for line in (workdir / "dropped.jsonl").read_text().splitlines()]
    assert [r["id"] for r in receipts if r["reason"] == "malformed"] == [f"{path}:{number}" for number in (2, 3, 4)]
    assert len(receipts) + len((workdir / kept).read_text().splitlines()) == 7
