"""Reading answers: where each kind of server puts its reasoning, and what is no answer at all."""

import json
from typing import Any

import pytest

from jaxdistill import thinking
from jaxdistill.collect.reply import ReasoningKind, UnreadableReply, read_reply, read_usage
from jaxdistill.records import Usage


@pytest.mark.parametrize(
    ("message", "kind", "reasoning", "content"),
    [
        ({"content": " 4 ", "reasoning_content": "2 + 2"}, "full", "2 + 2", "4"),
        ({"content": "4", "reasoning": "2 + 2"}, "full", "2 + 2", "4"),
        ({"content": "4", "reasoning": {"effort": "low"}}, "answer_only", None, "4"),
        ({"content": "<think>2 + 2</think>\n4"}, "full", "2 + 2", "4"),
        ({"content": "2 + 2\n</think>\n4"}, "full", "2 + 2", "4"),
        ({"content": "<think>\n2 + 2 and then"}, "full", "2 + 2 and then", ""),
        ({"content": "4", "reasoning_content": ""}, "answer_only", None, "4"),
        ({"content": None, "reasoning_content": "2 + 2"}, "full", "2 + 2", ""),
        ({"content": "4"}, "answer_only", None, "4"),
        (
            {"content": [{"type": "text", "text": "It "}, {"type": "text", "text": "is 4"}]},
            "answer_only",
            None,
            "It is 4",
        ),
        (
            {"content": [{"type": "thinking", "thinking": [{"type": "text", "text": "2 + 2"}]}, {"type": "text"}]},
            "full",
            "2 + 2",
            "",
        ),
        ({"content": "4", "reasoning_details": [{"type": "reasoning.text", "text": "2 + 2"}]}, "full", "2 + 2", "4"),
        (
            {
                "content": "4",
                "reasoning": "I add",
                "reasoning_details": [{"type": "reasoning.summary", "summary": "I add"}],
            },
            "summary",
            "I add",
            "4",
        ),
        (
            {"content": "4", "reasoning_details": [{"type": "reasoning.encrypted", "data": "xx"}]},
            "answer_only",
            None,
            "4",
        ),
    ],
)
def test_reasoning_is_found_wherever_servers_put_it(
    message: dict[str, Any], kind: ReasoningKind, reasoning: str | None, content: str
):
    raw = json.dumps({"choices": [{"message": message, "finish_reason": "stop"}]}).encode()
    reply = read_reply(raw)
    assert (reply.reasoning_kind, reply.reasoning, reply.content) == (kind, reasoning, content)
    assert reply.text == (content if reasoning is None else thinking.join(reasoning, content))


def response_of(*output: dict[str, Any], **fields: Any) -> bytes:
    return json.dumps({"object": "response", "status": "completed", "output": list(output), **fields}).encode()


MESSAGE = {"type": "message", "content": [{"type": "output_text", "text": "4"}]}


def test_responses_hold_a_summary_the_whole_reasoning_or_none():
    summary = {"type": "reasoning", "summary": [{"type": "summary_text", "text": t} for t in ("I add", "I check")]}
    usage = {"input_tokens": 7, "input_tokens_details": {"cached_tokens": 5}, "output_tokens": 9}
    usage["output_tokens_details"] = {"reasoning_tokens": 6}
    reply = read_reply(response_of(summary, MESSAGE, model="o4-mini", usage=usage))
    assert (reply.reasoning_kind, reply.reasoning, reply.content) == ("summary", "I add\n\nI check", "4")
    assert reply.usage == Usage(prompt_tokens=7, output_tokens=9, reasoning_tokens=6, cached_tokens=5)
    assert (reply.model, reply.finish_reason) == ("o4-mini", "stop")
    whole = {"type": "reasoning", "summary": [], "content": [{"type": "reasoning_text", "text": "2 + 2"}]}
    assert read_reply(response_of(whole, MESSAGE)).reasoning_kind == "full"
    empty = {"type": "reasoning", "summary": [], "encrypted_content": "xx"}
    assert read_reply(response_of(empty, MESSAGE)).reasoning_kind == "answer_only"
    for reason, finish in (("max_output_tokens", "length"), ("content_filter", "content_filter")):
        raw = response_of(summary, status="incomplete", incomplete_details={"reason": reason})
        assert read_reply(raw).finish_reason == finish
    line = {"id": "b", "custom_id": "k", "response": {"status_code": 200, "body": json.loads(response_of(MESSAGE))}}
    assert read_reply(json.dumps(line).encode()).content == "4"


NO_COMPLETIONS = (
    b"",
    b"<html>502 Bad Gateway</html>",
    b"[]",
    b'{"choices": []}',
    b'{"choices": [7]}',
    b'{"choices": [{"finish_reason": "stop"}]}',
    b'{"choices": [{"message": null, "finish_reason": "stop"}]}',
    b'{"choices": [{"message": {"content": "4"}, "finish_reason": "insufficient_system_resource"}]}',
)
COMPLETIONS_OF_OTHER_KINDS = (
    b'{"choices": [{"message": {"content": "4"}, "finish_reason": "tool_calls"}]}',
    b'{"choices": [{"message": {"content": "4"}, "finish_reason": "model_length"}]}',
    b'{"choices": [{"message": {"content": "4"}}]}',
    b'{"choices": [{"message": {"content": [1]}, "finish_reason": "stop"}]}',
    b'{"output": [], "status": "in_progress"}',
)


@pytest.mark.parametrize("raw", [*NO_COMPLETIONS, *COMPLETIONS_OF_OTHER_KINDS])
def test_bodies_that_cannot_be_read_are_named_so(raw: bytes):
    with pytest.raises(UnreadableReply):
        read_reply(raw)


def test_counts_that_are_no_numbers_count_nothing():
    usage = {"prompt_tokens": "x", "completion_tokens": 3, "completion_tokens_details": None}
    raw = json.dumps({"choices": [{"message": {"content": "4"}, "finish_reason": "stop"}], "usage": usage}).encode()
    assert read_reply(raw).usage == Usage(output_tokens=3)
    assert read_reply(raw.replace(b'"x"', b"1e999").replace(b": 3", b": NaN")).usage == Usage()
    assert read_usage(raw.replace(b'"x"', b"1e999").replace(b": 3", b": NaN")) is None
    assert read_usage(b'{"choices": [{"message": {}}]}') is None
