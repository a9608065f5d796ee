"""Bodies of requests: what is taken, and that every other one is refused with a message that says where."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from jaxdistill.errors import UserError
from jaxdistill.sample.request import SamplingConfig
from jaxdistill.serve.schema import ApiError, ChatBody, CompletionBody, parse

CHAT = {"model": "m", "messages": [{"role": "user", "content": "1+1"}]}
COMPLETION = {"model": "m", "prompt": "1+1"}


def chat(**changes: Any) -> ChatBody:
    return parse(ChatBody, json.dumps({**CHAT, **changes}).encode())


def completion(**changes: Any) -> CompletionBody:
    return parse(CompletionBody, json.dumps({**COMPLETION, **changes}).encode())


def test_what_is_left_out_has_openais_defaults():
    assert chat().sampling(7) == SamplingConfig(temperature=1.0, max_new_tokens=7)
    assert chat(temperature=None, top_p=None, stop=None, seed=None).sampling(7) == chat().sampling(7)
    assert completion(max_tokens=0).sampling(0).max_new_tokens == 1


def test_every_setting_reaches_the_sampler():
    settings = {
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": 3,
        "min_p": 0.1,
        "presence_penalty": 1.0,
        "frequency_penalty": -1.0,
        "repetition_penalty": 1.1,
    }
    assert chat(**settings).sampling(9) == SamplingConfig(**settings, max_new_tokens=9)
    assert chat(top_k=-1).sampling(9).top_k == 0
    assert chat(stop="x").stops == ("x",)
    assert chat(stop=["x", "y"]).stops == ("x", "y")


def test_messages():
    content = [{"type": "text", "text": "1"}, {"type": "text", "text": "+1"}]
    messages = [
        {"role": "developer", "content": content},
        {"role": "assistant", "content": "2", "reasoning_content": "r"},
    ]
    assert [message.message() for message in chat(messages=messages).messages] == [
        {"role": "system", "content": "1+1"},
        {"role": "assistant", "content": "2", "reasoning_content": "r"},
    ]


@pytest.mark.parametrize(
    ("prompt", "prompts"),
    [("a", ["a"]), (["a", "b"], ["a", "b"]), ([1, 2], [[1, 2]]), ([[1], [2, 3]], [[1], [2, 3]])],
)
def test_prompts(prompt: Any, prompts: list[Any]):
    assert completion(prompt=prompt).prompts == prompts


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"messages": []}, "messages: .*at least 1"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages.0.role: Input should be 'system'"),
        ({"messages": [{"role": "user", "content": None}]}, "messages.0.content"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
            "Input should be 'text'",
        ),
        ({"temperature": "hot"}, "temperature: Input should be a valid number"),
        ({"temperature": -1}, "temperature: .*greater than or equal to 0"),
        ({"temperature": float("nan")}, "temperature: .*finite number"),
        ({"top_p": 0}, "top_p: "),
        ({"n": 0}, "n: "),
        ({"n": True}, "n: .*valid integer"),
        ({"seed": 2**64}, "seed: "),
        ({"stop": ["a"] * 17}, "stop.*at most 16"),
        ({"stop": ""}, "stop"),
        ({"tools": []}, "tools: this server has no such field; leave it out"),
        ({"logit_bias": {"1": 5}}, "logit_bias: this server has no such field"),
        ({"response_format": {"type": "json_object"}}, "response_format.type: Input should be 'text'"),
        ({"top_logprobs": 21}, "top_logprobs: "),
        ({"stream_options": {"include_obfuscation": True}}, "include_obfuscation: .*expected false"),
        ({"stream_options": {"include_obfuscation": 0}}, "include_obfuscation: .*valid boolean"),
    ],
)
def test_what_is_refused(changes: dict[str, Any], words: str):
    with pytest.raises(ApiError, match=words) as caught:
        chat(**changes)
    assert caught.value.status == 400
    assert caught.value.param == next(iter(changes))


@pytest.mark.parametrize("best_of", [True, 2, "1"])
def test_only_one_is_the_best_of_one(best_of: Any):
    assert completion(best_of=1).best_of == 1
    with pytest.raises(ApiError, match="best_of: "):
        completion(best_of=best_of)


@pytest.mark.parametrize(
    "raw", [b"", b"{", b"[]", b"null", b'{"model": "\xff"}', b"\xff\xfe", b'"\\ud800"', b"[" * 100_000, b"1e999"]
)
def test_what_is_no_object_is_refused(raw: bytes):
    with pytest.raises(ApiError) as caught:
        parse(ChatBody, raw)
    assert caught.value.status == 400
    json.dumps(caught.value.body).encode()


def test_many_mistakes_are_told_shortly():
    with pytest.raises(ApiError, match=r"and 17 more") as caught:
        chat(**{f"field{i}" * 100: 1 for i in range(20)})
    assert len(str(caught.value)) < 1000
    with pytest.raises(ApiError):
        completion(prompt=[0] * 100_000 + ["x"])


NUMBERS = st.one_of(st.none(), st.integers(), st.floats(), st.booleans(), st.sampled_from(["", "x"]))


@hypothesis_settings(deadline=None)
@given(
    settings=st.dictionaries(
        st.sampled_from(
            ["temperature", "top_p", "top_k", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty"]
        ),
        NUMBERS,
    ),
    more=st.dictionaries(st.sampled_from(["n", "seed", "max_tokens", "stop", "logprobs", "echo", "best_of"]), NUMBERS),
)
def test_settings_of_any_value_are_taken_or_refused(settings: dict[str, Any], more: dict[str, Any]):
    """What is taken is what the sampler can compute with in float32."""
    try:
        sampling = completion(**settings, **more).sampling(8)
    except (ApiError, UserError):
        return
    assert sampling.temperature == 0 or 1e-6 <= sampling.temperature <= 100
    assert 0 <= sampling.top_k < 2**31
    assert 1e-6 <= sampling.repetition_penalty <= 1e6
