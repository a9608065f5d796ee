"""What `jaxdistill tti` prints and writes: the paper's leaderboard, and one more work beside it."""

from pathlib import Path

import pytest
from test_report import HOSTILE, LOADS, Reader
from test_transparency import LEADERBOARD, answers, write

from jaxdistill import cli
from jaxdistill.report import tti


def test_score_prints_every_indicator_and_the_total(capsys: pytest.CaptureFixture[str], monkeypatch, tmp_path: Path):
    monkeypatch.setenv("COLUMNS", "160")
    path = write(tmp_path, {"name": "mine", "answers": answers(paper={"verdict": "open", "reason": "to be written"})})
    cli.main(["tti", "score", str(path)])
    text = capsys.readouterr().out
    assert "to be written" in text
    assert text.count("https://example.com/work") == 24
    assert "data 14, methodology 33, evaluation 24, open source 25 to 29; total 96 to 100 of 100" in text


def test_leaderboard_is_the_papers_with_a_work_added(capsys: pytest.CaptureFixture[str], monkeypatch, tmp_path: Path):
    monkeypatch.setenv("COLUMNS", "160")
    name = HOSTILE.replace("\x00", "").replace("\ud83d", "")[:40]  # YAML holds neither
    path = write(tmp_path, {"name": name, "answers": answers(paper={"verdict": "open", "reason": name})})
    html = tmp_path / "board.html"
    cli.main(["tti", "leaderboard", "--works", str(path), "--html", str(html)])
    text = capsys.readouterr().out
    order = [line.split("│")[1].strip() for line in text.splitlines() if line.startswith("│")]
    assert order[1:] == sorted(LEADERBOARD, key=lambda name: -LEADERBOARD[name][-1])
    reader = Reader(html.read_text())
    assert reader.open == []
    assert not reader.tags & {"script", "link", "img", "iframe", "a"}
    assert all(value.startswith("#") for _, attribute, value in reader.attributes if attribute in LOADS)
    shown = " ".join(reader.text.split())
    for work, points in LEADERBOARD.items():
        assert f"{work} {' '.join(map(str, points))}" in shown
    assert "96 to 100" in shown
    assert "earned, as its subtotal says" in shown
    assert "<svg " in html.read_text()


def test_two_works_of_one_name_are_refused(tmp_path: Path):
    path = write(tmp_path, {"name": "k0Math", "answers": answers()})
    with pytest.raises(tti.UserError, match="two works are named k0Math"):
        tti.leaderboard(tti.LeaderboardConfig(works=(path,)))
