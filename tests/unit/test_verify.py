"""Extraction of answers, equality of answers, and a worker that survives hostile ones."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxdistill.verify import Verifier, VerifierPool, extract_answer, extract_phrase

TIMEOUT_S = 2.0


@pytest.fixture(scope="module")
def verifier() -> Iterator[Verifier]:
    with Verifier(timeout_s=TIMEOUT_S) as one:
        yield one


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (r"so \boxed{5}", "5"),
        (r"\boxed{1} then \boxed{2}", "2"),
        (r"\boxed{1} then \boxed{2", "1"),
        (r"\boxed{1 and so \boxed{2}", "2"),
        (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"\boxed{a\}b}", r"a\}b"),
        (r"\boxed{\boxed{5}}", "5"),
        (r"\boxed{\boxed{1}+\boxed{2}}", r"\boxed{1}+\boxed{2}"),
        (r"\fbox {7}", "7"),
        (r"\\boxed{7}", "7"),
        (r"\\\boxed{7}", "7"),
        (r"\boxed{}", ""),
        (r"\boxedx{5}", None),
        (r"\boxed 5", None),
        ("", None),
        (r"<think>\boxed{1}</think> It is \boxed{2}.", "2"),
        (r"\boxed{1}</think> It is 2.", None),
        (r"<think>\boxed{1}", None),
        (r"<think>a</think>\boxed{1}<think>\boxed{2}", None),
        (r"a</think>b</think>\boxed{3}", "3"),
    ],
)
def test_extract_answer(text: str, answer: str | None) -> None:
    assert extract_answer(text) == answer


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("So the answer is 42.", "42"),
        ("The final answer is: **$\\frac{1}{2}$**.\nDone", "\\frac{1}{2}"),
        ("Answer: 7, because 3 + 4 is 7", "7"),
        ("The answer is 3. Wait, no: the answer is 4.", "4"),
        ("The answer is 3.5", "3.5"),
        ("因此答案是 12。", "12"),
        ("最终答案为：$\\sqrt{2}$", "\\sqrt{2}"),
        ("综上, 故选 B.", "B"),
        ("<think>the answer is 1</think> The answer is 2", "2"),
        ("<think>the answer is 1", None),
        ("I do not know.", None),
        ("The answer is", None),
    ],
)
def test_phrases_that_announce_an_answer(text: str, answer: str | None) -> None:
    assert extract_phrase(text) == answer


balanced = st.recursive(
    st.text(st.characters(codec="utf-8", exclude_characters="{}\\<>"), max_size=5)
    | st.sampled_from([r"\{", r"\}", r"\\"]),
    lambda inner: st.lists(inner, max_size=3).map("".join) | inner.map(lambda s: "{" + s + "}"),
    max_leaves=8,
)


@given(before=balanced, content=balanced, after=balanced)
def test_a_balanced_box_is_found_whole(before: str, content: str, after: str) -> None:
    assert extract_answer(before + r" \boxed{" + content + "}" + after) == content.strip()


@given(content=balanced, tail=balanced)
def test_an_open_box_is_ignored(content: str, tail: str) -> None:
    assert extract_answer(r"\boxed{" + content + r"} \boxed{" + tail) == content.strip()


@given(st.text(alphabet=r"\{}boxed fbox", max_size=200))
def test_extraction_never_fails(text: str) -> None:
    answer = extract_answer(text)
    assert answer is None or answer in text


@given(st.integers(-(10**12), 10**12), st.sampled_from(["{}", " {} ", "${}$", "{:,}", "{}.", r"\text{{{}}}", "{:+}"]))
def test_spellings_of_an_integer_need_no_worker(number: int, spelling: str) -> None:
    with Verifier() as verifier:
        assert verifier.equivalent(spelling.format(number), str(number)).label == "correct"
        assert verifier.equivalent(spelling.format(number), str(number + 1)).label == "wrong"
        assert verifier._worker is None


@pytest.mark.parametrize(
    ("answer", "gold", "label", "rule"),
    [
        ("204", "204", "correct", "exact"),
        ("\\$18", "18", "correct", "exact"),
        ("18 dollars", "18", "correct", "exact"),
        ("033", "33", "correct", "integer"),
        ("1,234", "1234", "correct", "integer"),
        ("-5", "5", "wrong", "integer"),
        ("9" * 4000, "9" * 3999, "wrong", "integer"),
        ("52_9", "52_{8}", "wrong", "base"),
        ("52", "52_8", "correct", "math_verify"),
        (r"\left(3,\dfrac{\pi}{2}\right)", r"\left( 3, \frac{\pi}{2} \right)", "correct", "exact"),
        (r"(3, 0.5\pi)", r"\left( 3, \frac{\pi}{2} \right)", "correct", "math_verify"),
        ("Evelyn", r"\text{Evelyn}", "correct", "exact"),
        (r"\text{west}", r"\text{east}", "wrong", "math_verify"),
        ("90", r"90^\circ", "correct", "math_verify"),
        (r"15\text{ cm}^2", r"15\mbox{ cm}^2", "correct", "exact"),
        ("15", r"15\mbox{ cm}^2", "correct", "math_verify"),
        ("0.5", "1/2", "correct", "math_verify"),
        ("0.51", "1/2", "wrong", "math_verify"),
        ("3, 5", "5,3", "correct", "math_verify"),
        ("3", "3,6", "wrong", "math_verify"),
        (r"\text{no more than 3}", "3", "wrong", "math_verify"),
        ("是", "否", "unverifiable", "unparsed"),
        (r"\frac{1", "5", "unverifiable", "unparsed"),
        ("x" * 5000, "5", "unverifiable", "too_long"),
        ("2^{2^{2^{10}}}", "5", "unverifiable", "too_large"),
        ("2^{2^{2^{10}}}", "2^{2^{2^{10}}}", "correct", "exact"),
        ("(" * 60 + "1" + ")" * 60, "5", "unverifiable", "too_large"),
        ("3^{2007}", "3^{2006}", "wrong", "math_verify"),
        (" ", "5", "wrong", "no_answer"),
    ],
)
def test_equivalent(verifier: Verifier, answer: str, gold: str, label: str, rule: str) -> None:
    verdict = verifier.equivalent(answer, gold)
    assert (verdict.label, verdict.rule) == (label, rule)


def test_the_order_of_a_pair_matters(verifier: Verifier) -> None:
    """math-verify takes an interval for a gold inequality, but no inequality for a gold interval: gold goes first."""
    assert verifier.equivalent("1 < x < 2", "(1, 2)").label == "wrong"
    assert verifier.equivalent("(1, 2)", "1 < x < 2").label == "correct"


def test_verify_reads_the_text_and_reports_what_it_compared(verifier: Verifier) -> None:
    verdict = verifier.verify(r"<think>\boxed{3}</think> so \boxed{\frac{2}{4}}", "0.5")
    assert (verdict.label, verdict.rule, verdict.extracted) == ("correct", "math_verify", r"\frac{2}{4}")
    assert verifier.verify("I do not know.", "0.5").rule == "no_answer"


def test_phrases_count_only_where_they_are_asked_for_and_there_is_no_box(verifier: Verifier) -> None:
    assert verifier.verify("答案是 $\\frac{2}{4}$", "0.5", phrases=True).rule == "phrase/math_verify"
    assert verifier.verify("答案是 7", "7").rule == "no_answer"
    assert verifier.verify("the answer is 7 \\boxed{8}", "7", phrases=True).label == "wrong"


def test_a_pool_keeps_the_order_and_survives_its_workers() -> None:
    outputs = [(f"\\boxed{{\\frac{{{i}}}{{2}}}}", str(i / 2)) for i in range(20)]
    outputs.insert(7, ("\\boxed{9^{9^{9^9}}}", "5"))
    outputs.insert(3, ("\\boxed{" + "\\frac{1}{" * 400 + "2" + "}" * 400 + "}", "5"))
    with VerifierPool(2, timeout_s=TIMEOUT_S) as pool:
        verdicts = list(pool.verify_all(outputs))
    assert [verdict.label for verdict in verdicts].count("correct") == 20
    assert verdicts[8].rule == "too_large"
    assert verdicts[3].rule == "too_large"
    with pytest.raises(ValueError, match="workers is 0"):
        VerifierPool(0)


HOSTILE = {
    "power tower": "9^{9^{9^9}}",
    "big power": "10^{10^{10}}",
    "factorial": "1000000000!",
    "polynomial": "(x+1)^{100000}",
    "open fractions": r"\frac{1}{" * 5000,
    "nested fractions": r"\frac{1}{" * 400 + "2" + "}" * 400,
    "nested brackets": "(" * 1000 + "1" + ")" * 1000,
    "long": "1+" * 500_000 + "1",
    "one letter": "x" * 4000,
    "nul and half a surrogate": "\x00\ud800",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_answers_return_in_time_and_the_next_one_is_judged(verifier: Verifier, name: str) -> None:
    start = time.monotonic()
    verdict = verifier.verify(rf"\boxed{{{HOSTILE[name]}}}", "5")
    assert time.monotonic() - start < TIMEOUT_S + 2
    assert verdict.label in ("unverifiable", "wrong")
    assert verifier.equivalent("0.5", "1/2").label == "correct"


@pytest.mark.parametrize(
    "text",
    ["{" * 10**6, "\\" * 10**6, r"\boxed{" * 150_000, r"\boxed{" * 150_000 + "}" * 150_000, r"\boxed" + " " * 10**6],
)
def test_extraction_takes_linear_time(text: str) -> None:
    start = time.monotonic()
    extract_answer(text)
    assert time.monotonic() - start < 5


def test_a_dead_worker_is_a_crash_and_is_replaced() -> None:
    with Verifier(timeout_s=TIMEOUT_S) as verifier:
        assert verifier.equivalent("0.5", "1/2").label == "correct"
        assert verifier._worker
        verifier._worker.kill()
        verifier._worker.wait()
        verdict = verifier.equivalent("0.5", "1/2")
        assert (verdict.label, verdict.rule) == ("unverifiable", "crash")
        assert verifier.equivalent("0.5", "1/2").label == "correct"


PARENT = """
from jaxdistill.verify import Verifier
verifier = Verifier(timeout_s=2.0)
assert verifier.equivalent("0.5", "1/2").label == "correct"
print(verifier._worker.pid, flush=True)
"""


@pytest.mark.parametrize("last_line", ["input()", "verifier.equivalent('9^{9^{9^9}}', '5')"], ids=["idle", "busy"])
def test_the_worker_ends_when_its_parent_is_killed(last_line: str) -> None:
    """Idle, it reads end of file; inside an endless power, its own alarm ends it."""
    script = PARENT + last_line
    with subprocess.Popen([sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as parent:
        assert parent.stdout
        worker = int(parent.stdout.readline())
        time.sleep(0.5)
        parent.kill()
    deadline = time.monotonic() + 12
    while time.monotonic() < deadline:
        try:
            os.kill(worker, 0)
        except ProcessLookupError:
            return
        time.sleep(0.1)
    os.kill(worker, signal.SIGKILL)
    pytest.fail("the worker outlived its parent by 12 s")


def test_neither_side_imports_jax() -> None:
    script = (
        "import sys, jaxdistill.verify, jaxdistill.evaluate.grade, jaxdistill.evaluate.tasks, math_verify\n"
        "sys.exit('jax' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", script]).returncode == 0


def test_timeout_must_be_positive() -> None:
    with pytest.raises(ValueError, match="timeout_s is 0"):
        Verifier(timeout_s=0.0)
