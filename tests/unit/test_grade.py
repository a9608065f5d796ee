"""Tasks, grades and summaries on small invented data."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import pytest

from jaxdistill.errors import UserError
from jaxdistill.evaluate import tasks
from jaxdistill.evaluate.grade import answer_classes, grade, summarize
from jaxdistill.records import Completion, Problem, Verdict
from jaxdistill.verify import Verifier


@pytest.fixture(scope="module")
def verifier() -> Iterator[Verifier]:
    with Verifier() as one:
        yield one


def completion(
    item: str,
    sample: int,
    text: str,
    finish_reason: Literal["stop", "length"] = "stop",
    thinking: int = 10,
    answer: int = 2,
) -> Completion:
    return Completion(
        id=f"t/{item}/{sample}",
        task="t",
        item_id=item,
        sample_index=sample,
        seed=sample,
        settings={"temperature": 0.6},
        text=text,
        thinking_tokens=thinking,
        answer_tokens=answer,
        finish_reason=finish_reason,
    )


def test_grades_and_summary(verifier: Verifier) -> None:
    completions = [
        completion("a", 0, r"\boxed{5}"),
        completion("a", 1, r"\boxed{5}", finish_reason="length", thinking=100),
        completion("a", 2, " "),
        completion("b", 0, "I do not know."),
        completion("b", 1, r"\boxed{0.5}"),
        completion("b", 2, r"\boxed{是}", answer=8),
    ]
    scores = grade(completions, {"a": "5", "b": r"\frac{1}{2}"}, verifier)
    assert [score.verdict.rule for score in scores] == [
        "exact", "truncated", "empty", "no_answer", "math_verify", "unparsed",
    ]  # fmt: skip
    assert [score.verdict.label == "correct" for score in scores] == [True, False, False, False, True, False]
    summary = summarize(completions, scores, verifier)
    assert summary.accuracy.value == pytest.approx(1 / 3)
    assert (summary.accuracy.n_problems, summary.accuracy.n_samples) == (2, 6)
    assert {k: e.value for k, e in summary.pass_at.items()} == pytest.approx({1: 1 / 3, 2: 2 / 3, 3: 1.0})
    assert summary.maj_at[3].value == pytest.approx(0.75)  # a: one vote, right; b: a tie of two
    assert (summary.thinking_tokens.average, summary.thinking_tokens.median) == (25, 10)
    assert (summary.answer_tokens.average, summary.tokens.median) == (3, 12)
    rates = summary.truncation_rate, summary.empty_rate, summary.no_answer_rate, summary.unverifiable_rate
    assert rates == pytest.approx((1 / 6,) * 4)


def test_wrong_answers_of_equal_value_are_one_class(verifier: Verifier) -> None:
    verdicts = [
        Verdict(label="wrong", rule="math_verify", extracted=text) for text in ("1/2", "0.5", r"\frac{1}{2}", "3")
    ]
    assert len(set(answer_classes(verdicts))) == 4
    with_verifier = answer_classes(verdicts, verifier)
    assert len(set(with_verifier[:3])) == 1
    assert len(set(with_verifier)) == 2


def test_what_does_not_fit_together_is_refused(verifier: Verifier) -> None:
    completions = [completion("a", 0, r"\boxed{5}"), completion("a", 1, r"\boxed{5}"), completion("b", 0, r"\boxed{5}")]
    with pytest.raises(UserError, match=r"no gold answer for items \['b'\]"):
        grade(completions, {"a": "5"}, verifier)
    scores = grade(completions, {"a": "5", "b": "5"}, verifier)
    with pytest.raises(ValueError, match="1 items have fewer than 2 samples"):
        summarize(completions, scores)
    with pytest.raises(ValueError, match="one score for each"):
        summarize(completions, scores[:2])
    with pytest.raises(ValueError, match="one score for each"):
        summarize([], [])


def test_tasks_are_found_by_name() -> None:
    assert {"aime2024", "gsm8k", "math500", "problems"} <= set(tasks.names())
    for name in tasks.names():
        task = tasks.task(name)
        assert task.name == name
        assert all((task.grader, task.metric, task.licence, task.why, task.source))
    problem = Problem(id="1", problem="What is {1} and {problem}?")
    assert tasks.task("gsm8k").ask(problem).startswith("What is {1} and {problem}?\n\nPlease")
    assert tasks.task("gsm8k").ask(problem).endswith(r"\boxed{}.")
    with pytest.raises(UserError, match="no task is named 'gsm9k'; expected one of"):
        tasks.task("gsm9k")
    with pytest.raises(ValueError, match="expected a template with"):
        tasks.Task(name="x", problems_from=lambda p: [], prompt="", grader="", metric="", licence="", why="", source="")


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "found no rows"),
        ([{"id": "1", "problem": "?"}], r"line 1 \(1\) has no answer"),
        ([{"id": "1", "problem": "?", "answer": "5"}] * 2, "line 2 repeats the id '1' of line 1"),
        ([{"id": "1", "question": "?", "answer": "5"}], r":1: not a Problem: missing fields \['problem'\]"),
        ([{"id": "1", "problem": "?", "answer": 5}], r":1: answer: found 5, expected str"),
        ([{"id": "1", "problem": "?", "answer": "5", "meta": 5}], r":1: meta: found 5"),
        ([[1]], "found a JSON list, expected an object"),
    ],
)
def test_bad_files_are_the_users_mistake(tmp_path: Path, rows: list, message: str) -> None:
    path = tmp_path / "own.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(UserError, match=message):
        tasks.task("problems").problems_from(path)


def test_gsm8k_is_read_as_it_is_published(tmp_path: Path) -> None:
    row = {"question": "How much?", "answer": "He pays 2 * 600 = 1200.\n#### 1,200"}
    (tmp_path / "test.jsonl").write_text(json.dumps(row) + "\n")
    [problem] = tasks.task("gsm8k").problems_from(tmp_path / "test.jsonl")
    assert (problem.id, problem.problem, problem.answer) == ("gsm8k-test-1", "How much?", "1200")
    assert problem.solution == "He pays 2 * 600 = 1200."


def test_a_missing_file_is_the_users_mistake(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such file"):
        tasks.task("aime2024").problems_from(tmp_path / "absent.jsonl")


def test_select_is_fixed_nested_and_independent_of_file_order() -> None:
    problems = [Problem(id=str(i), problem="?") for i in range(100)]
    ten = tasks.select(problems, 10, seed=0)
    assert len(ten) == 10
    assert [int(p.id) for p in ten] == sorted(int(p.id) for p in ten)
    assert {p.id for p in ten} == {p.id for p in tasks.select(problems[::-1], 10, seed=0)}
    assert {p.id for p in ten} < {p.id for p in tasks.select(problems, 20, seed=0)}
    assert ten != tasks.select(problems, 10, seed=1)
    assert tasks.select(problems, None, seed=0) == problems
    for limit in (0, 101):
        with pytest.raises(UserError, match="expected 1 to 100"):
            tasks.select(problems, limit, seed=0)
