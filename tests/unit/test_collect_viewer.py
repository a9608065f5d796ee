"""The page of chains needs nothing from elsewhere, and what models write cannot break it; chains with two answers."""

import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from jaxdistill.collect import viewer
from jaxdistill.collect.calls import Call, boxes_differ, judge
from jaxdistill.collect.ledger import Ledger
from jaxdistill.collect.request import Failure, Response
from jaxdistill.collect.teacher import Teacher, TeacherConfig
from jaxdistill.records import Problem
from jaxdistill.verify import Verifier, boxed_answers

HOSTILE = "</div><script>alert(1)</script>\u202e<b>&amp; \\ud83d"


class Tags(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append(tag)
        assert not {name for name, _ in attrs} & {"src", "href", "onclick", "onload"}
        if tag not in ("meta", "link", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_page_shows_problems_with_all_their_answers(tmp_path: Path):
    teacher = Teacher(TeacherConfig(base_url="http://127.0.0.1:9/v1"))
    problem = Problem(id="p<1>", problem=f"What is 2 + 2? {HOSTILE}", answer="4")
    calls = []
    for index in range(3):
        request = teacher.request(({"role": "user", "content": problem.problem},), index)
        calls.append(Call(problem, request, request.key))
    raw = (
        b'{"choices": [{"message": {"content": "So \\\\boxed{4}", "reasoning_content": "<i>I add</i> \\ud83d"}, '
        b'"finish_reason": "stop"}], "usage": {"prompt_tokens": 5, "completion_tokens": 1234}}'
    )
    with Ledger(tmp_path / "ledger.sqlite") as ledger, Verifier() as verifier:
        ledger.begin()
        ledger.record([(call.request, 10, 10) for call in calls])
        ledger.claim(3, 0.0)
        ledger.answer(calls[0].key, Response(raw=raw, request_id="r", sent=1.0, received=3.5))
        ledger.settle(calls[0].key, 12_300_000, 1239)
        ledger.answer(calls[1].key, Response(raw=raw.replace(b"{4}", b"{5}"), request_id="r", sent=1.0, received=2.0))
        ledger.settle(calls[1].key, None, None)
        ledger.fail(calls[2].key, Failure(detail=f"HTTP 400: {HOSTILE}", permanent=True))
        results = [(call, judge(call, ledger.result(call.key), verifier)) for call in calls]
        viewer.write(tmp_path / "chains.html", HOSTILE, ["o3", "$0.01 spent"], results, 1, ledger)
    page = (tmp_path / "chains.html").read_text(encoding="utf-8")
    tags = Tags()
    tags.feed(page)
    assert not tags.open
    assert "script" not in tags.seen
    assert tags.seen.count("details") == 2
    assert "default-src 'none'" in page
    assert not re.search(r"https?://|@import|url\(", page)
    for words in ("1 of 3 verified", "✓ verified", "✗ wrong", "✗ failed", "1,234 tokens", "$0.0123", "2.5 s"):
        assert words in page
    assert "reasoning (full)" in page
    assert "&lt;i&gt;I add&lt;/i&gt;" in page


@pytest.mark.parametrize(
    ("text", "boxes", "differ"),
    [
        (r"\boxed{4}", ["4"], False),
        (r"\boxed{4} or \boxed{5}", ["4", "5"], True),
        (r"\boxed{0.5}, that is \boxed{\frac{1}{2}}", ["0.5", r"\frac{1}{2}"], False),
        (r"<think>\boxed{3}? no</think> \boxed{4}", ["4"], False),
        (r"\boxed{a \boxed{4} b} and \boxed{4}", [r"a \boxed{4} b", "4"], None),
        ("no box", [], False),
    ],
)
def test_two_different_answers_are_told(text: str, boxes: list[str], differ: bool | None):
    assert boxed_answers(text) == boxes
    if differ is not None:
        with Verifier() as verifier:
            assert boxes_differ(text, verifier) == differ
