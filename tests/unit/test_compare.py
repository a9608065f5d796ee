"""Two models compared: paired numbers, the table, and the page in a real browser."""

import json
import re
from collections.abc import Sequence
from pathlib import Path

import pytest
from browser import browser

from jaxdistill.evaluate import page, tasks
from jaxdistill.evaluate.compare import compare, compare_all
from jaxdistill.evaluate.config import EvaluateConfig
from jaxdistill.evaluate.grade import grade, repeats, summarize
from jaxdistill.evaluate.plan import Plan, names_of
from jaxdistill.evaluate.results import Result, measures
from jaxdistill.records import Completion, Problem
from jaxdistill.verify import Verifier

HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(1)> <!-- & \u2028 \ud83d"


def result(
    name: str, texts: Sequence[Sequence[str]], golds: Sequence[str], tokens: tuple[int, int] = (10, 2)
) -> Result:
    """What a model said to each problem, graded."""
    config = EvaluateConfig(workdir=Path(), model=(Path(name),), task="problems", path=Path("p.jsonl"))
    problems = [Problem(id=f"p{i}", problem=f"Problem {i} {HOSTILE}", answer=gold) for i, gold in enumerate(golds)]
    plan = Plan(config, tasks.task("problems"), problems, name, Path(name), Path(name), f"sha256:{name}", name)
    completions = [
        Completion(
            id=f"problems/p{i}/{j}",
            task="problems",
            item_id=f"p{i}",
            sample_index=j,
            seed=0,
            settings={},
            text=text,
            thinking_tokens=tokens[0],
            answer_tokens=tokens[1],
            finish_reason="stop",
        )
        for i, samples in enumerate(texts)
        for j, text in enumerate(samples)
    ]
    with Verifier() as verifier:
        scores = grade(completions, {p.id: p.answer or "" for p in problems}, verifier)
        return Result(
            plan=plan, completions=completions, scores=scores, summary=summarize(completions, scores, verifier)
        )


def boxed(*answers: int) -> list[str]:
    return [f"<think>\nI think.\n</think>\n\\boxed{{{answer}}}" for answer in answers]


def test_a_comparison_counts_flips_both_ways():
    before = result("before", [boxed(1), boxed(2), boxed(0), boxed(0)], "1234")
    after = result("after", [boxed(1), boxed(0), boxed(3), boxed(4)], "1234")
    found = compare(before, after)
    assert (found.gained, found.lost, found.both, found.neither) == (2, 1, 1, 0)
    assert (found.solved.first_only, found.solved.second_only) == (1, 2)
    assert found.difference.value == pytest.approx(0.25)
    assert found.difference.p_value == found.solved.p_value == 1  # with one sample both are McNemar's test
    assert "inside the noise" in found.verdict
    assert compare_all([before, after, before])[1].difference.value == 0


def test_a_large_difference_is_no_noise():
    golds = [str(i) for i in range(1, 31)]
    before = result("before", [boxed(0, 0) for _ in golds], golds)
    after = result("after", [boxed(int(g), int(g) if int(g) % 2 else 0) for g in golds], golds)
    found = compare(before, after)
    assert found.difference.value == pytest.approx(0.75)
    assert found.difference.low > 0.5
    assert found.difference.p_value < 0.001
    assert found.verdict.endswith("after is better by more than chance explains.")
    assert compare(after, before).verdict.endswith("before is worse by more than chance explains.")


def test_the_table_has_a_column_for_each_model():
    one = result("a", [boxed(1, 2), boxed(2, 0)], "12", tokens=(100, 10))
    two = result("b", [["", "no"], [r"\boxed{2} " + "again, " * 50, "wait " * 40]], "12")
    rows = measures({r.name: r.summary for r in (one, two)})
    assert rows["thinking tokens, mean / median"] == ["100 / 100", "10 / 10"]
    assert rows["tokens, mean / median"] == ["110 / 110", "12 / 12"]
    assert rows["ends in a loop"] == ["0.0%", "50.0%"]
    assert rows["empty"] == ["0.0%", "25.0%"]
    assert {"avg@2 [95% interval]", "pass@2", "maj@2"} < rows.keys()


@pytest.mark.parametrize(
    ("text", "loops"),
    [
        ("", False),
        ("The answer is \\boxed{4}.", False),
        ("So 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21, 22, 23, 24, 25, 26.", False),
        ("x" * 99, False),
        ("x" * 100, True),
        ("Wait, no. " * 10, True),
        ("Wait, no. " * 3, False),
        ("Let me check. " + "This step is the same as before, so I do it again. \n" * 4, True),
        ("".join(f"Step {i} of many, each with its number. " for i in range(100)), False),
        ("word " * 30 + "so \\boxed{4}", False),
    ],
)
def test_loops_at_the_end_are_found(text: str, loops: bool):
    assert repeats(text) is loops


def test_models_are_named_by_what_tells_them_apart():
    assert names_of([Path("runs/a/sft"), Path("base")]) == ["sft", "base"]
    assert names_of([Path("runs/a/sft"), Path("runs/b/sft")]) == ["a-sft", "b-sft"]


def test_the_page_opens_searches_and_shows_both_sides(tmp_path: Path):
    before = result("before", [boxed(1), [f"<think>\nfirst {HOSTILE}\n</think>\n{HOSTILE}"], boxed(0)], "123")
    after = result("after", [boxed(0), boxed(2), boxed(0)], "123")
    page.write(tmp_path / "evaluation.html", [before, after], compare_all([before, after]))
    html = (tmp_path / "evaluation.html").read_text(encoding="utf-8")
    assert not re.search(r"https?://|@import|\bsrc=\"", html)
    data = html.split('<script id="data" type="application/json">')[1].split("</script>")[0]
    assert len(json.loads(data)["rows"]) == 3
    with browser() as shown:
        shown.open(tmp_path / "evaluation.html")
        rows = "[...document.querySelectorAll('.row .name')].map(name => name.textContent)"
        assert shown.evaluate(rows) == ["p0", "p1", "p2"]
        assert shown.evaluate("[...show.options].map(option => option.text)")[:5] == [
            "all (3)", "only after right, not before (1)", "only before right, not after (1)",
            "all right (0)", "none right (1)",
        ]  # fmt: skip
        shown.evaluate("show.value = 1; show.dispatchEvent(new Event('change'))")
        assert shown.evaluate(rows) == ["p1"]
        shown.evaluate("show.value = 0; search.value = 'FIRST </script>'; search.dispatchEvent(new Event('input'))")
        assert shown.evaluate(rows) == ["p1"]
        shown.evaluate("document.querySelector('.row > button').click()")
        assert shown.evaluate("document.querySelectorAll('.columns > section').length") == 2
        assert shown.evaluate("document.querySelector('.columns details .text').textContent").startswith(
            "first </script>"
        )
        assert shown.evaluate("document.querySelectorAll('mark').length") >= 1
        assert shown.evaluate("document.querySelectorAll('img').length") == 0
        assert shown.evaluate("document.scripts.length") == 2


def test_a_page_of_long_outputs_opens_and_searches_fast(tmp_path: Path):
    """500 problems x 2 models x 8k tokens (32,000 characters): opens in under 3 s, searches in under 200 ms."""
    thought = "Let me add the parts again, since 12 + 30 = 42 and I should check it by taking one away. "
    golds = [str(i + 1) for i in range(500)]

    def texts(word: str, answer: str) -> list[list[str]]:
        return [
            [f"<think>\n{(f'{word} {i} ' + thought) * 330}\n</think>\nThe answer is {answer.format(i + 1)}."]
            for i in range(500)
        ]

    results = [result("before", texts("alpha", "{}"), golds), result("after", texts("beta", r"\boxed{{{}}}"), golds)]
    assert min(len(c.text) for r in results for c in r.completions) > 31_000
    page.write(tmp_path / "evaluation.html", results, compare_all(results))
    with browser() as shown:
        opened_ms = shown.open(tmp_path / "evaluation.html")
        shown.evaluate(
            "new Promise(done => (function wait() { prepared < rows.length ? setTimeout(wait, 20) : done(); })())"
        )
        search_ms = shown.evaluate(
            "(() => { const took = []; for (const word of ['b', 'beta 499', 'nowhere', 'check it']) {"
            " const start = performance.now(); search.value = word; search.dispatchEvent(new Event('input'));"
            " document.body.offsetHeight; took.push(performance.now() - start); } return took; })()"
        )
        print(f"opened in {opened_ms:.0f} ms; searches took {', '.join(f'{ms:.0f}' for ms in search_ms)} ms")
        assert opened_ms < 3000
        assert max(search_ms) < 200
