"""The golden numbers of shared/data, and the benchmarks' own gold answers."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from jaxdistill.errors import UserError
from jaxdistill.evaluate import tasks
from jaxdistill.evaluate.grade import RIGHT, answer_classes
from jaxdistill.evaluate.statistics import avg_at_n, maj_at_k, mcnemar, paired_difference, pass_at_k
from jaxdistill.records import read_json_objects
from jaxdistill.verify import Verifier


@pytest.fixture(scope="module")
def verifier() -> Iterator[Verifier]:
    with Verifier() as one:
        yield one


def test_aime2024_k10(shared_data: Path, verifier: Verifier) -> None:
    rows = [row for _, row in read_json_objects(shared_data / "paper_outputs/aime2024_k10_extracted.jsonl")]
    verdicts = [[verifier.equivalent(answer, row["answer"]) for answer in row["extracted"]] for row in rows]
    correct = [[verdict.label == "correct" for verdict in samples] for samples in verdicts]
    average = avg_at_n(correct)
    assert (average.n_problems, average.n_samples) == (30, 300)
    assert round(average.value, 4) == 0.1467
    assert average.low < 0.1467 < average.high
    assert {k: round(pass_at_k(correct, k).value, 4) for k in (2, 5, 10)} == {2: 0.1867, 5: 0.2417, 10: 0.2667}
    classes = [answer_classes(samples, verifier) for samples in verdicts]
    # The published 7/30 gives nothing for the one tie (294 and 1225 have two votes each); drawing lots gives half.
    assert maj_at_k(classes, [RIGHT] * 30, 10, ties="strict").value == pytest.approx(7 / 30)
    assert maj_at_k(classes, [RIGHT] * 30, 10).value == pytest.approx(7.5 / 30)


@pytest.mark.parametrize(
    ("name", "file", "count"),
    [
        ("aime2024", "aime2024/aime2024.jsonl", 30),
        ("aime2025", "aime2025/aime2025.jsonl", 30),
        ("amc23", "extra_math/amc23.jsonl", 40),
        ("gsm8k", "gsm8k/test.jsonl", 1319),
        ("math2024", "math2024/math2024.jsonl", 30),
        ("math500", "math500/math500.jsonl", 500),
        ("olymmath_en", "extra_math/olymmath.jsonl", 200),
        ("olymmath_zh", "extra_math/olymmath.jsonl", 200),
    ],
)
def test_gold_answers_verify_against_themselves(
    shared_data: Path, verifier: Verifier, name: str, file: str, count: int
) -> None:
    """As they are by the fast rule; and by math-verify, in another spelling that the fast rule does not see through."""
    problems = tasks.task(name).problems_from(shared_data / file)
    assert len(problems) == count
    answers = [problem.answer or "" for problem in problems]
    assert [a for a in answers if verifier.verify(rf"\boxed{{{a}}}", a).label != "correct"] == []
    hard = [a for a in answers if not a.isdecimal()]
    assert [a for a in hard if verifier._ask(a, a).label != "correct"] == []


@pytest.mark.parametrize(
    ("dataset", "before", "after", "lost", "gained", "p"),
    [
        ("WildSafety", 0.92, 0.865, 18, 7, 0.043),
        ("Flames", 0.91, 0.925, 5, 8, 0.58),
        ("DiaSafety", 1.0, 1.0, 0, 0, 1.0),
    ],
)
def test_the_papers_safety_before_and_after(
    shared_data: Path, dataset: str, before: float, after: float, lost: int, gained: int, p: float
) -> None:
    """Table 2's row from the paper's own verdicts; which of its changes are more than chance it does not say."""
    safe: dict[str, list[bool]] = {"before_sft": [], "after_sft": []}
    for _, row in read_json_objects(shared_data / "paper_outputs/safety600_responses_safetyj.jsonl"):
        if row["dataset"] == dataset:
            safe[row["model"]].append(row["safe"] in (True, "True"))
    first, second = safe["before_sft"], safe["after_sft"]
    assert len(first) == 200
    assert [avg_at_n([[one] for one in answers]).value for answers in (first, second)] == [before, after]
    test = mcnemar(first, second)
    difference = paired_difference([float(one) for one in first], [float(one) for one in second])
    assert (test.first_only, test.second_only) == (lost, gained)
    assert test.p_value == pytest.approx(p, abs=0.005)
    assert difference.p_value == pytest.approx(test.p_value)
    assert difference.value == pytest.approx(after - before)


def test_olymmath_asks_the_same_problems_in_two_languages(shared_data: Path) -> None:
    sets = [
        tasks.task(name).problems_from(shared_data / "extra_math/olymmath.jsonl")
        for name in ("olymmath_en", "olymmath_zh")
    ]
    english, chinese = ({p.id.removesuffix(f"-{p.language.upper()}"): p for p in rows} for rows in sets)
    assert english.keys() == chinese.keys()
    assert {p.meta["level"] for p in english.values()} == {"easy", "hard"}
    assert "求" in "".join(p.problem for p in chinese.values())


def test_a_file_without_the_language_is_named(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"id": "a", "problem": "1+1", "answer": "2", "lang": "en"}\n')
    assert len(tasks.task("olymmath_en").problems_from(path)) == 1
    with pytest.raises(UserError, match=r"none of the 1 rows has the lang 'zh'"):
        tasks.task("olymmath_zh").problems_from(path)


def test_last_boxes_of_real_long_thought_verify(shared_data: Path, verifier: Verifier) -> None:
    rows = (shared_data / "long_thought/r1_distill_qwen32b_limo.jsonl").read_text().splitlines()
    chains = [json.loads(row) for row in rows]
    wrong = [c["id"] for c in chains if verifier.verify(c["response"], c["answer"]).label != "correct"]
    assert (len(chains), wrong) == (291, [])
