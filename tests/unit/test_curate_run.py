"""The curate command end to end: what is kept, a receipt for every other row, and what the manifest promises."""

import dataclasses
import json
import re
import subprocess
import sys
from pathlib import Path

import curation
import pytest

from jaxdistill import manifest
from jaxdistill.curate.run import CurateConfig, main
from jaxdistill.errors import UserError
from jaxdistill.reading import Dropped
from jaxdistill.records import Problem, read_jsonl

LONG = "A farmer has {} cows, sells a third of them, and then buys as many again as he has left. How many has he now?"
ROWS = [
    {"id": "a", "problem": LONG.format(30), "answer": "40", "difficulty": 2.5, "source": "farm"},
    {"id": "b", "question": "Compute $\\dfrac{1}{2}+\\frac{1}{3}$.", "answer": "5/6"},
    {"id": "c", "problem": "Compute \\(\\frac 1 2 + \\frac{1}{3}\\)", "answer": "5/6"},  # b, re-typeset
    {"id": "d", "problem": LONG.format(30).replace("A farmer", "One farmer"), "answer": "40"},  # nearly a
    {"id": "e", "problem": LONG.format(60), "answer": "80"},  # another number: another problem
    {"id": "f", "problem": "Prove that 2 is prime.", "answer": "2"},
    {"id": "g", "conversations": [{"from": "human", "value": "Find $x$ if $x = 3$."}, {"from": "gpt", "value": "3"}]},
    {"id": "h", "text": "?"},
    {"id": "i", "problem": "What is the sum of the first 50 odd positive integers not divisible by 7?", "answer": "1"},
    {"id": "a", "problem": "How many primes are below 100?", "answer": "25"},  # another problem under an id of before
]  # fmt: skip
EVALUATION = {
    "id": "e1",
    "problem": "What is the sum of the first $50$ odd positive integers not divisible by $7$?",
}


def write(path: Path, lines: list[str]) -> Path:
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


@pytest.fixture
def config(tmp_path: Path) -> CurateConfig:
    lines = [json.dumps(row) for row in ROWS]
    lines[3:3] = ["{not json", '["a list"]', ""]
    pool = write(tmp_path / "pool.jsonl", lines)
    held = write(tmp_path / "eval.jsonl", [json.dumps(EVALUATION)])
    return CurateConfig(inputs=(pool,), evaluation_sets=(held,), workdir=tmp_path / "run", report=True)


def test_every_row_is_kept_or_has_a_receipt(config: CurateConfig, capsys: pytest.CaptureFixture[str]):
    counts = main(config)
    assert counts == {
        "kept": 4,
        "contaminated": 1,
        "duplicate": 1,
        "malformed": 2,
        "near_duplicate": 1,
        "no_answer": 1,
        "proof": 1,
        "unknown_shape": 1,
    }
    kept = {problem.id: problem for problem in read_jsonl(config.workdir / "problems.jsonl", Problem)}
    assert list(kept) == ["a", "b", "e", "a#2"]
    assert kept["a"].meta == {"difficulty": 2.5}
    receipts = {row.id: row for row in read_jsonl(config.workdir / "dropped.jsonl", Dropped)}
    assert receipts["d"].reason == "near_duplicate"
    assert receipts["d"].detail.endswith("repeats a")
    assert receipts["c"].place == f"{config.inputs[0]}:3"
    broken = f"{config.inputs[0]}:4"
    assert receipts[broken].reason == "malformed"
    assert f"malformed: {broken}: " in capsys.readouterr().err
    assert "e1" in receipts["i"].detail
    record = json.loads((config.workdir / "manifest.json").read_text())
    assert record["counts"] == counts
    assert record["parameters"]["overlap"] == config.overlap
    assert record["inputs"][str(config.inputs[0])] == f"sha256:{manifest.file_hash(config.inputs[0])}"
    assert not list(config.workdir.glob("*.partial"))


def test_running_again_gives_the_same_files(config: CurateConfig):
    main(config)
    first = {name: (config.workdir / name).read_bytes() for name in ("problems.jsonl", "dropped.jsonl", "report.html")}
    main(config)
    assert first == {name: (config.workdir / name).read_bytes() for name in first}


def test_strict_ends_at_the_first_malformed_line(config: CurateConfig):
    with pytest.raises(UserError, match=re.escape(f"{config.inputs[0]}:4: malformed")):
        main(dataclasses.replace(config, strict=True))
    assert not (config.workdir / "problems.jsonl").exists()


def test_an_evaluation_set_that_is_not_whole_is_refused(config: CurateConfig, tmp_path: Path):
    broken = write(tmp_path / "broken.jsonl", [json.dumps(EVALUATION), "{"])
    with pytest.raises(UserError, match=r"broken\.jsonl:2: malformed"):
        main(dataclasses.replace(config, evaluation_sets=(broken,)))
    empty = write(tmp_path / "empty.jsonl", [""])
    with pytest.raises(UserError, match="holds no problem"):
        main(dataclasses.replace(config, evaluation_sets=(empty,)))


def test_mistakes_in_the_options_are_named(config: CurateConfig):
    for change, words in (
        ({"rules": ("prof",)}, "rules \\['prof'\\] are unknown"),
        ({"inputs": ()}, "inputs is empty"),
        ({"duplicate_jaccard": 0.0}, "duplicate_jaccard is 0.0"),
    ):
        with pytest.raises(UserError, match=words):
            dataclasses.replace(config, **change)
    with pytest.raises(UserError, match="overlap is 0"):
        main(dataclasses.replace(config, overlap=0.0))


def test_the_report_is_one_offline_page_with_examples_of_each_reason(config: CurateConfig):
    counts = main(config)
    page = (config.workdir / "report.html").read_text()
    for reason in counts:
        assert reason in page
    assert "Prove that 2 is prime." in page
    assert "difficulty" in page
    assert not re.search(r"<script|<link|src=|https?://", page)


def test_a_manifest_says_what_later_files_were_checked_against(config: CurateConfig, tmp_path: Path):
    main(config)
    held = manifest.file_hash(config.evaluation_sets[0])
    problems = config.workdir / "problems.jsonl"
    assert manifest.cleared_of(problems) == {held}
    later = tmp_path / "later"
    manifest.write_manifest(later, "collect", [problems], {})
    assert manifest.cleared_of(later / "chains.jsonl") == {held}
    other = write(tmp_path / "other" / "x.jsonl", ["{}"]) if (tmp_path / "other").mkdir() is None else problems
    manifest.write_manifest(tmp_path / "both", "mix", [problems, other], {})
    assert manifest.cleared_of(tmp_path / "both" / "examples.jsonl") == frozenset()
    problems.write_text("{}")
    assert manifest.cleared_of(later / "chains.jsonl") == frozenset()


def test_all_marked_rows_of_the_real_pool_are_found_and_few_others(shared_data: Path, tmp_path: Path):
    marked, flagged = curation.contamination(shared_data)
    assert len(marked) == 26
    assert marked <= flagged
    checked = curation.labels("contamination_labels.json")
    assert flagged - marked <= checked.keys()
    wrong = [name for name in flagged - marked if checked[name] == "different"]
    assert len(wrong) <= 0.002 * 5565


def test_retypeset_evaluation_problems_are_found(shared_data: Path):
    found, count = curation.retypeset(shared_data)
    assert found == count == 530


def test_memory_stays_flat_while_rows_stream(tmp_path: Path):
    """Four times the rows: less than 100 bytes a row more."""
    program = """
import json, sys
from pathlib import Path
from jaxdistill.curate.run import CurateConfig, main
folder, rows = Path(sys.argv[1]), int(sys.argv[2])
with (folder / "pool.jsonl").open("w") as lines:
    for i in range(rows):
        row = {"problem": f"What is {i} plus {i * i} times {i + 7}?", "answer": "1", "solution": "step " * 400}
        lines.write(json.dumps(row) + chr(10))
main(CurateConfig(inputs=(folder / "pool.jsonl",), workdir=folder / f"run{rows}"))
(line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
print(line.split()[1])  # kB; getrusage would count what the process that started this one had
"""
    peaks = []
    for rows in (2_000, 8_000):
        run = subprocess.run(
            [sys.executable, "-c", program, str(tmp_path), str(rows)], capture_output=True, text=True, check=True
        )
        peaks.append(int(run.stdout) * 1024)
    assert (peaks[1] - peaks[0]) / 6_000 < 1_000
