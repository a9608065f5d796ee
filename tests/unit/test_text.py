"""Text while it comes: the parts add up to the whole, whatever the pieces, and end before a stop string."""

from typing import Any

import pytest
import tiny
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxdistill import thinking
from jaxdistill.sample.text import TextStream

TOKENIZER: Any = tiny.tokenizer()
IDS = st.lists(st.integers(0, len(TOKENIZER) - 1), max_size=200)  # bytes in any order: most are no characters


def cut(values: Any, sizes: list[int]) -> list[Any]:
    """Consecutive pieces of these sizes, and the rest."""
    pieces = []
    for size in sizes:
        pieces.append(values[:size])
        values = values[size:]
    return [*pieces, values]


def whole(ids: list[int]) -> str:
    return TOKENIZER.decode(ids, skip_special_tokens=True)


@settings(deadline=None)
@given(ids=IDS, sizes=st.lists(st.integers(0, 9), max_size=40))
def test_parts_add_up_to_the_whole_text(ids: list[int], sizes: list[int]):
    stream = TextStream(TOKENIZER)
    parts = [stream.add(piece) for piece in cut(ids, sizes)]
    assert "".join(parts) + stream.end() == whole(ids)
    assert stream.tokens == len(ids)


def test_a_character_is_told_when_its_last_byte_came():
    ids = TOKENIZER("aé€🙂b", add_special_tokens=False)["input_ids"]
    assert len(ids) == 11
    stream = TextStream(TOKENIZER)
    assert [stream.add([token]) for token in ids] == ["a", "", "é", "", "", "€", "", "", "", "🙂", "b"]
    assert stream.end() == ""


@settings(deadline=None)
@given(
    text=st.text("ab🙂", max_size=80),
    stops=st.lists(st.text("ab🙂", min_size=1, max_size=4), min_size=1, max_size=3),
    sizes=st.lists(st.integers(1, 9), max_size=40),
)
def test_nothing_is_told_from_a_stop_string_on(text: str, stops: list[str], sizes: list[int]):
    ids = TOKENIZER(text, add_special_tokens=False)["input_ids"]
    ends = [(text.index(stop) + len(stop), text.index(stop)) for stop in stops if stop in text]
    end, start = min(ends, default=(len(text), len(text)))
    stream = TextStream(TOKENIZER, stops)
    said = ""
    for piece in cut(ids, sizes):
        said += stream.add(piece)
        assert text[:start].startswith(said)
    assert said + stream.end() == text[:start]
    assert stream.stopped == bool(ends)
    used = len(TOKENIZER(text[:end], add_special_tokens=False)["input_ids"])
    assert stream.tokens == used, "tokens up to the one that completes the stop string"


def test_special_tokens_are_not_text():
    ids = TOKENIZER("<|im_start|>he<|im_end|>", add_special_tokens=False)["input_ids"]
    stream = TextStream(TOKENIZER, ["<|im_end|>"])
    assert stream.add(ids) + stream.end() == "he"
    assert not stream.stopped


@pytest.mark.parametrize(
    ("text", "opened", "reasoning", "answer"),
    [
        ("<think>\na < b\n</think>\n\nyes", False, "\na < b\n", "yes"),
        ("a</b></think>yes </think>", True, "a</b>", "yes </think>"),
        ("no thoughts <think>", False, "", "no thoughts <think>"),
        ("<thin", False, "", "<thin"),
        ("<think>never done </thin", False, "never done </thin", ""),
        ("  \n<think>x</think>y", False, "x", "y"),
        ("", False, "", ""),
    ],
)
@pytest.mark.parametrize("size", [1, 2, 3, 100])
def test_reasoning_is_told_from_the_answer(text: str, opened: bool, reasoning: str, answer: str, size: int):
    splitter = thinking.Splitter(opened)
    parts = [splitter.add(text[i : i + size]) for i in range(0, len(text), size)] + [splitter.end()]
    found = ["".join(part) for part in zip(*parts, strict=True)]
    assert found == [reasoning, answer]
