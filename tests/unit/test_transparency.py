"""The index is the paper's, its published points are reproduced, and what they leave open stays open."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from jaxdistill.errors import UserError
from jaxdistill.transparency import index

MOST = {"data": 14, "methodology": 33, "evaluation": 24, "open_source": 29}  # arXiv 2411.16489
LEADERBOARD = {  # of the same paper: points by dimension, in their order, and the total
    "Open O1": (0, 8, 20, 5, 33),
    "O1 Journey, Part 1": (10, 33, 24, 9, 76),
    "LLaMA-O1": (0, 6, 0, 5, 11),
    "k0Math": (0, 0, 16, 0, 16),
    "Skywork O1": (0, 0, 0, 0, 0),
    "DeepSeek-R1-Lite": (0, 0, 20, 0, 20),
    "O1 Journey, Part 2": (10, 33, 24, 12, 79),
}


def answers(**changes: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """A yes to everything, with changes."""
    yes = {"verdict": "disclosed", "evidence": ["https://example.com/work"]}
    return {name: changes.get(name, yes) for name in index.indicators()}


def write(folder: Path, values: Any) -> Path:
    path = folder / "work.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def test_the_index_has_25_indicators_of_100_points():
    found = index.indicators()
    assert len(found) == 25
    points = {name: sum(i.points for i in found.values() if i.dimension == name) for name in index.DIMENSIONS}
    assert points == MOST
    assert {name for name, i in found.items() if i.may_be_unused} == {"search_algorithm", "reinforcement_learning"}


def test_the_papers_works_score_what_the_paper_says():
    works = [index.load(path) for path in index.WORKS.glob("*.yaml")]
    scores = {work.name: index.score(work) for work in works}
    found = {
        name: (*(score.by_dimension[d].low for d in index.DIMENSIONS), score.total.low)
        for name, score in scores.items()
    }
    assert found == LEADERBOARD
    assert all(score.total.low == score.total.high for score in scores.values())


def test_subtotals_say_of_an_indicator_what_every_way_to_reach_them_says():
    part_2 = index.load(index.WORKS / "o1-journey-part-2.yaml")
    earned = index.score(part_2).earned
    # 10 of 3 + 3 + 4 + 4: both of the threes, and one of the fours, nobody published which
    assert earned["data_sources"] is True
    assert earned["data_documented"] is True
    assert earned["selection_criteria"] is None
    assert earned["synthetic_generation"] is None
    assert all(earned[name] for name, i in index.indicators().items() if i.dimension in ("methodology", "evaluation"))
    llama = index.score(index.load(index.WORKS / "llama-o1.yaml")).earned
    assert llama["training_data_public"] is False  # no way to 5 points has its 3
    assert llama["weights_public"] is None
    assert llama["pipeline"] is False  # 6 of methodology is even: 3 is the only odd one


def test_a_work_with_answers_scores_their_points_and_leaves_open_ones_open(tmp_path: Path):
    work = index.load(
        write(
            tmp_path,
            {
                "name": "mine",
                "answers": answers(
                    reinforcement_learning={"verdict": "unused", "evidence": ["README"]},
                    ablations={"verdict": "undisclosed", "reason": "none were run"},
                    paper={"verdict": "open", "reason": "a person must say"},
                ),
            },
        )
    )
    score = index.score(work)
    assert score.by_dimension["methodology"] == index.Points(29, 29)
    assert score.by_dimension["open_source"] == index.Points(25, 29)
    assert score.total == index.Points(92, 96)
    assert str(score.total) == "92 to 96"
    assert (score.earned["ablations"], score.earned["paper"]) == (False, None)
    again = tmp_path / "again.yaml"
    again.write_text(index.dump(work))
    assert index.load(again) == work


def test_an_answer_narrows_what_published_points_leave_open(tmp_path: Path):
    points = {"data": 10, "methodology": 33, "evaluation": 24, "open_source": 12}
    published = {"source": "paper", "points": points, "total": 79}
    known = {"selection_criteria": {"verdict": "undisclosed", "reason": "not in the paper"}}
    work = index.load(write(tmp_path, {"name": "mine", "published": published, "answers": known}))
    assert index.score(work).earned["synthetic_generation"] is True


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"name": "m", "answers": {}}, "no answer to data_sources"),
        ({"name": "m", "answers": answers() | {"datta": answers()["paper"]}}, "no indicator is named datta"),
        ({"name": "m", "answers": answers(paper={"verdict": "disclosed"})}, "paper is disclosed without evidence"),
        ({"name": "m", "answers": answers(paper={"verdict": "open"})}, "paper is open without a reason"),
        ({"name": "m", "answers": answers(paper={"verdict": "unused", "evidence": ["x"]})}, "paper is unused; only"),
        ({"name": "m", "answers": answers(paper={"verdict": True})}, "found True, expected one of"),
        ({"name": "m", "answer": {}}, "unknown fields ['answer']"),
        (["m"], "found a list"),
        (
            {
                "name": "m",
                "published": {
                    "source": "s",
                    "points": {"data": 1, "methodology": 0, "evaluation": 0, "open_source": 0},
                    "total": 2,
                },
            },
            "add up to another number",
        ),
        (
            {
                "name": "m",
                "published": {
                    "source": "s",
                    "points": {"data": 1, "methodology": 0, "evaluation": 0, "open_source": 0},
                    "total": 1,
                },
            },
            "data was published with 1 points, which no choice",
        ),
    ],
)
def test_a_malformed_work_is_refused_with_what_to_mend(tmp_path: Path, values: Any, message: str):
    with pytest.raises(UserError) as caught:
        index.load(write(tmp_path, values))
    assert message in str(caught.value)
    assert "work.yaml" in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [("name: a\nname: b\n", "'name' stands twice"), ("name: [", "not valid YAML"), (None, "no such file")],
)
def test_a_file_that_is_no_yaml_is_refused(tmp_path: Path, text: str | None, message: str):
    path = tmp_path / "work.yaml"
    if text is not None:
        path.write_text(text)
    with pytest.raises(UserError, match=message):
        index.load(path)
