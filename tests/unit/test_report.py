"""The report page: hostile text stays text, nothing comes from elsewhere, the numbers are there."""

import dataclasses
import math
import random
from html.parser import HTMLParser
from pathlib import Path

import pytest

from jaxdistill.evaluate.grade import Summary, Tokens
from jaxdistill.evaluate.statistics import Estimate
from jaxdistill.report.page import Comparison, Page, Stage, write

HOSTILE = (
    "<script>alert('7')</script></details></div><img src=x onerror=alert(1)>"
    '"><svg onload=alert(1)> &amp; {{ 7 * 7 }} <!-- ]]> \u202e \ud83d \x00 "\'`$x_1'
)
VOID = {"meta", "img", "br", "hr", "input", "link"}
LOADS = {"src", "href", "xlink:href", "srcset", "action", "data", "poster", "formaction", "background"}


def estimate(value: float, spread: float = 0.04) -> Estimate:
    low, high = max(0.0, value - spread), min(1.0, value + spread)
    return Estimate(value=value, low=low, high=high, n_problems=128, n_samples=512)


def summary(accuracy: float, tokens: float, truncated: float = 0.0) -> Summary:
    maj = {1: estimate(accuracy), 2: estimate(accuracy), 4: estimate(min(1.0, accuracy * 1.05))}
    return Summary(
        accuracy=estimate(accuracy),
        pass_at=maj,
        maj_at=maj,
        tokens=Tokens(average=tokens, median=tokens),
        thinking_tokens=Tokens(average=tokens - 10, median=tokens - 10),
        answer_tokens=Tokens(average=10.0, median=10.0),
        truncation_rate=truncated,
        empty_rate=0.0,
        no_answer_rate=0.0,
        unverifiable_rate=0.0,
        repetition_rate=0.0,
    )


def curve(start: float, end: float, steps: int, seed: int) -> list[tuple[int, float]]:
    noise = random.Random(seed)
    return [(i, end + start * math.exp(-i / 40) + 0.05 * end * noise.random()) for i in range(1, steps + 1)]


def comparison(index: int, characters: int = 5000) -> Comparison:
    thought = "Plan: add the parts. 12 + 30 = 42. Wait, I should check: 42 - 30 = 12. Good.\n"
    long = (thought * characters)[:characters]
    return Comparison(
        question=f"What is {index} + 30?",
        gold=str(index + 30),
        outputs={
            "base": ("zq qz zq", False),
            "phase1": ("12 + 30 is 41, so \\boxed{41}", False),
            "phase2": (f"<think>\n{long}\n</think>\nThe answer is \\boxed{{{index + 30}}}", True),
        },
    )


def page(**changes: object) -> Page:
    whole = Page(
        title="jaxdistill demo",
        facts={"commit": "0123abc", "seed": "0", "wall time": "5 min 12 s", "jax": "0.10.2", "python": "3.11.9"},
        collected={"verified": 2711, "wrong": 163, "truncated": 98, "failed": 28},
        stages=(
            Stage(name="base", summary=summary(0.0, 512.0, truncated=0.994)),
            Stage(name="phase1", summary=summary(0.613, 61.0)),
            Stage(name="phase2", summary=summary(0.918, 187.0, truncated=0.023)),
        ),
        losses={"phase1": curve(4.5, 0.35, 300, 1), "phase2": curve(1.2, 0.12, 400, 2)},
        heldout={"phase1": [(0, 6.2), (300, 0.38)], "phase2": [(0, 2.1), (400, 0.14)]},
        comparisons=tuple(comparison(i) for i in range(12)),
    )
    return dataclasses.replace(whole, **changes)  # type: ignore[arg-type]


class Reader(HTMLParser):
    """Collects tags, attributes and text; fails on a tag that closes another one's."""

    def __init__(self, html: str):
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: set[str] = set()
        self.attributes: list[tuple[str, str, str]] = []
        self.text = ""
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_startendtag(tag, attrs)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, f"</{tag}> at {self.getpos()} closes another element"

    def handle_data(self, data: str) -> None:
        self.text += data


def read(tmp_path: Path, shown: Page) -> tuple[str, Reader]:
    path = tmp_path / "report" / "report.html"
    write(path, shown)
    assert [p.name for p in path.parent.iterdir()] == ["report.html"]
    html = path.read_text(encoding="utf-8")
    reader = Reader(html)
    assert reader.open == []
    return html, reader


def test_the_page_is_well_formed_small_and_holds_the_numbers(tmp_path: Path):
    html, reader = read(tmp_path, page())
    assert html.startswith("<!DOCTYPE html>")
    assert len(html.encode()) < 2_000_000
    text = " ".join(reader.text.split())
    for shown in (
        "phase2 91.8% [87.8, 95.8] 96.4% [92.4, 100.0] k = 4 187 2.3% 128 × 4",
        "base 0.0% [0.0, 4.0] 0.0% [0.0, 4.0] k = 4 512 99.4% 128 × 4",
        "from 0.0% [0.0, 4.0] (base) to 91.8% [87.8, 95.8] (phase2), average output from 512 to 187 tokens",
        "kept: verified 2,711 90.4%",
        "dropped: wrong 163 5.4%",
        "0123abc",
        "What is 11 + 30?",
        "✓ correct",
        "✗ wrong",
        "95% interval over problems",
    ):
        assert shown in text
    assert html.count("<details>") == 12  # the long reasoning of each phase2 output, and nothing else
    assert html.count("<svg ") == 2


def test_nothing_comes_from_elsewhere(tmp_path: Path):
    html, reader = read(tmp_path, page())
    assert "http://" not in html
    assert "https://" not in html
    assert not reader.tags & {"script", "link", "img", "iframe", "object", "embed", "base", "form", "a"}
    assert all(value.startswith("#") for _, name, value in reader.attributes if name in LOADS)
    assert "@import" not in html
    assert html.count("url(") == html.count("url(#")


def test_ids_are_unique_and_every_reference_has_its_id(tmp_path: Path):
    _, reader = read(tmp_path, page())
    ids = [value for _, name, value in reader.attributes if name == "id"]
    assert len(ids) == len(set(ids))
    used = {value[1:] for _, name, value in reader.attributes if name in LOADS}
    used |= {value[5:-1] for _, name, value in reader.attributes if name == "clip-path"}
    assert used
    assert used <= set(ids)


def test_hostile_text_stays_text_wherever_it_stands(tmp_path: Path):
    _, calm = read(tmp_path, page())
    name = "<script>$x_1</details>\"'&#<!--"  # short, since Matplotlib gives a stage's name its room
    hostile = page(
        title=HOSTILE,
        facts={HOSTILE: HOSTILE},
        collected={HOSTILE: 3, "verified": 1},
        stages=(Stage(name=name, summary=summary(0.5, 100.0)), Stage(name="b", summary=summary(0.6, 100.0))),
        losses={name: curve(1, 1, 3, 0)},
        heldout={name: [(0, 1.0)]},
        comparisons=(
            Comparison(
                question=HOSTILE,
                gold=HOSTILE,
                outputs={name: (HOSTILE, True), "b": (f"<think>{HOSTILE * 20}</think>{HOSTILE * 20}", False)},
            ),
        ),
    )
    html, reader = read(tmp_path, hostile)
    assert reader.tags <= calm.tags
    assert not [name for _, name, _ in reader.attributes if name.startswith("on")]
    assert html.count("<details>") == html.count("</details>") == 2
    assert "<script>alert('7')</script>" in reader.text
    assert "{{ 7 * 7 }}" in reader.text


@pytest.mark.parametrize(
    ("text", "labels"),
    [
        ("<think>\na\n</think>\nb", ["reasoning", "answer"]),
        ("a</think>b", ["reasoning", "answer"]),
        ("<think> cut off", ["reasoning"]),
        ("only an answer", ["answer"]),
        ("  ", ["no text"]),
    ],
)
def test_reasoning_and_answer_are_shown_apart(tmp_path: Path, text: str, labels: list[str]):
    html, _ = read(tmp_path, page(comparisons=(Comparison(question="q", gold="1", outputs={"base": (text, False)}),)))
    assert [line.split("<")[0] for line in html.split('<p class="label">')[1:]] == labels


def test_a_run_of_one_stage_without_training_or_collection(tmp_path: Path):
    alone = dataclasses.replace(summary(0.25, 0.0), maj_at={1: estimate(0.25)})
    empty = {"collected": {}, "losses": {}, "heldout": {}, "comparisons": ()}
    html, reader = read(tmp_path, page(stages=(Stage(name="base", summary=alone),), **empty))
    for shown in ("one sample", "No loss was logged.", "Nothing was collected", "No samples were kept"):
        assert shown in reader.text
    assert "Accuracy went from" not in html


def test_the_same_page_gives_the_same_bytes(tmp_path: Path):
    write(tmp_path / "a.html", page())
    write(tmp_path / "b.html", page())
    assert (tmp_path / "a.html").read_bytes() == (tmp_path / "b.html").read_bytes()


def test_stages_must_be_named_apart_and_comparisons_must_name_them():
    with pytest.raises(ValueError, match="one or more"):
        page(stages=())
    with pytest.raises(ValueError, match="name of its own"):
        page(stages=(Stage(name="base", summary=summary(0.1, 10.0)),) * 2)
    with pytest.raises(ValueError, match="phase1"):
        page(stages=(Stage(name="base", summary=summary(0.1, 10.0)),))
