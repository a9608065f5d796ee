"""The golden numbers of shared/data, and the benchmarks' own gold answers."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from jaxdistill.evaluate import tasks
from jaxdistill.evaluate.grade import RIGHT, answer_classes
from jaxdistill.evaluate.statistics import avg_at_n, maj_at_k, pass_at_k
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
        ("gsm8k", "gsm8k/test.jsonl", 1319),
        ("math500", "math500/math500.jsonl", 500),
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


def test_last_boxes_of_real_long_thought_verify(shared_data: Path, verifier: Verifier) -> None:
    rows = (shared_data / "long_thought/r1_distill_qwen32b_limo.jsonl").read_text().splitlines()
    chains = [json.loads(row) for row in rows]
    wrong = [c["id"] for c in chains if verifier.verify(c["response"], c["answer"]).label != "correct"]
    assert (len(chains), wrong) == (291, [])
