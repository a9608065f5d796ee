"""Which tokens of a conversation are trained, and where a turn ends, for templates of several kinds."""

import re

import numpy as np
import pytest
import tiny

from jaxdistill.data import chat
from jaxdistill.errors import UserError
from jaxdistill.records import Example

USER = {"role": "user", "content": "hello  there"}
# Llama 3's shape: what ends a turn is marked special, but no name points to it
UNNAMED = {"eos_token": "<|endoftext|>"}


def said(content: str) -> dict[str, str]:
    return {"role": "assistant", "content": content}


def trained_text(tokenizer, *messages: dict[str, str]) -> str:
    """What is trained, decoded; a bar between stretches that are apart."""
    document = chat.tokenize(tokenizer, Example(id="e", messages=messages))
    runs = np.split(np.arange(len(document.tokens)), np.flatnonzero(np.diff(document.trained)) + 1)
    return "|".join(tokenizer.decode(document.tokens[run]) for run in runs if document.trained[run[0]])


def test_answer_and_its_end_token_are_trained_where_pad_is_eos():
    tokenizer = tiny.tokenizer()
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    document = chat.tokenize(tokenizer, Example(id="e", messages=(USER, said("well")), weight=0.5))
    assert document.weight == 0.5
    whole = tokenizer.decode(document.tokens)
    assert whole == "<|im_start|>user\nhello  there<|im_end|>\n<|im_start|>assistant\nwell<|im_end|>\n"
    assert tokenizer.decode(document.tokens[document.trained]) == "well<|im_end|>"
    ends = np.flatnonzero(document.tokens == tokenizer.eos_token_id)
    assert document.trained[ends].tolist() == [False, True], "the user's end token has the same id"


def test_every_answer_of_a_conversation_is_trained():
    messages = ({"role": "system", "content": "be brief"}, USER, said("one"), USER, said("two"))
    assert trained_text(tiny.tokenizer(), *messages) == "one<|im_end|>|two<|im_end|>"


@pytest.mark.parametrize("trim_offsets", [False, True])
@pytest.mark.parametrize(
    "content", ["a", "if x:\n    y  z", " leading and trailing ", "é中文😀", "says <|im_end|> loudly"]
)
def test_whole_answer_is_trained_whatever_is_in_it(content: str, trim_offsets: bool):
    tokenizer = tiny.tokenizer(trim_offsets=trim_offsets)
    assert trained_text(tokenizer, USER, said(content)) == content + "<|im_end|>"


def test_end_token_without_a_name_is_found():
    tokenizer = tiny.tokenizer(named=UNNAMED)
    assert trained_text(tokenizer, USER, said("well")) == "well<|im_end|>"
    assert chat.end_tokens(tokenizer) == [2, 0]


@pytest.mark.parametrize("more_special", [(), ("<think>", "</think>")], ids=["plain", "special"])
def test_thoughts_are_trained_with_the_answer(more_special: tuple[str, ...]):
    tokenizer = tiny.tokenizer(tiny.QWEN3, more_special=more_special)
    expected = "<think>\nhm\n</think>\n\nok<|im_end|>"
    assert trained_text(tokenizer, USER, said("<think>\nhm\n</think>\n\nok")) == expected
    assert trained_text(tokenizer, USER, {**said("ok"), "reasoning_content": "hm"}) == expected
    assert trained_text(tokenizer, USER, said("ok")) == "<think>\n\n</think>\n\nok<|im_end|>"
    assert chat.end_tokens(tokenizer) == [2]


@pytest.mark.parametrize(
    ("template", "message", "lost"),
    [
        (tiny.CHATML, {**said("ok"), "reasoning_content": "hm, 6 * 7"}, "hm, 6"),
        (tiny.CHATML.replace("['content']", "['content'].split('</think>')[-1]"), said("<think>hm</think>ok"), "hm"),
        (tiny.CHATML.replace("['content']", "['content'].replace('k', 'c')"), said("ok"), "ok"),
    ],
    ids=["ignored key", "thoughts cut", "words changed"],
)
def test_words_that_the_template_drops_are_missed(template: str, message: dict[str, str], lost: str):
    with pytest.raises(UserError, match=f"example e: the chat template drops or rewrites '{re.escape(lost)}"):
        trained_text(tiny.tokenizer(template), USER, message)


def test_prompt_that_ends_in_a_character_of_several_tokens_is_not_trained():
    template = tiny.CHATML.replace("+ '\n' +", "+ '答：' +").replace("assistant\n", "assistant答：")
    assert trained_text(tiny.tokenizer(template), USER, said("well")) == "well<|im_end|>"


def test_template_that_rewrites_earlier_turns_is_refused():
    messages = (USER, said("<think>\na\n</think>\n\none"), USER, said("<think>\nb\n</think>\n\ntwo"))
    with pytest.raises(UserError, match="example e: the chat template changes earlier text when turn 1 is added"):
        trained_text(tiny.tokenizer(tiny.QWEN3), *messages)


def test_prompt_ends_where_the_assistant_speaks():
    tokenizer = tiny.tokenizer()
    prompt = chat.prompt_tokens(tokenizer, [USER])
    document = chat.tokenize(tokenizer, Example(id="e", messages=(USER, said("well"))))
    assert document.tokens[: len(prompt)].tolist() == prompt
    assert not document.trained[: len(prompt)].any()
    assert document.trained[len(prompt)]


def test_end_tokens():
    assert chat.end_tokens(tiny.tokenizer()) == [2]
    assert chat.end_tokens(tiny.tokenizer(tiny.CHATML.replace("<|im_end|>", ""))) == [2]


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ((USER,), "example e has no assistant words"),
        ((), "example e starts without a question"),
        ((said("a"), USER), "example e starts without a question"),
        (({"role": "user"}, said("a")), r"message 0 has \['role'\]; expected role and content"),
        (({"content": "a"},), r"message 0 has \['content'\]"),
    ],
)
def test_conversations_that_cannot_be_trained_on(messages: tuple[dict[str, str], ...], message: str):
    with pytest.raises(UserError, match=message):
        chat.tokenize(tiny.tokenizer(), Example(id="e", messages=messages))


def test_what_the_template_itself_refuses():
    template = "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    tokenizer = tiny.tokenizer(template + "{{ m.content }}{% endfor %}")
    with pytest.raises(UserError, match="refuses a conversation of the roles system, assistant: no system role"):
        chat.tokenize(tokenizer, Example(id="e", messages=({"role": "system", "content": "x"}, said("a"))))


def test_folder_without_tokenizer_or_template(tmp_path):
    with pytest.raises(UserError, match="no usable tokenizer"):
        chat.load_tokenizer(tmp_path)
    tiny.tokenizer("").save_pretrained(str(tmp_path))
    with pytest.raises(UserError, match="no chat template"):
        chat.load_tokenizer(tmp_path)
