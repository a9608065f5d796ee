"""Addresses, keys, waits, and what each HTTP status means, over real HTTP; the checks of the configuration."""

import asyncio
import contextlib
import dataclasses
import email.utils
import http.server
import json
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from jaxdistill.collect import transports
from jaxdistill.collect.api import Again, Outcome, Stop, connected, retry_after_s
from jaxdistill.collect.prompting import COLLECT_PROMPTS, fill, prompt_id, read_prompt
from jaxdistill.collect.request import Failure, Response
from jaxdistill.collect.teacher import TeacherConfig, read_key
from jaxdistill.errors import UserError

TEACHER = TeacherConfig(base_url="http://127.0.0.1:9/v1")
BODY = {"model": "local-teacher", "messages": [{"role": "user", "content": "What is 2 + 2?"}]}


@pytest.mark.parametrize(
    ("headers", "wait_s"),
    [
        ({}, None),
        ({"retry-after": "3"}, 3.0),
        ({"retry-after": "-3"}, 0.0),
        ({"retry-after": "soon"}, None),
        ({"retry-after": "nan"}, None),
        ({"retry-after-ms": "250", "retry-after": "9"}, 0.25),
        ({"retry-after": email.utils.formatdate(1_700_000_060, usegmt=True)}, 60.0),
    ],
)
def test_retry_after_is_read_in_all_its_forms(headers: dict[str, str], wait_s: float | None):
    assert retry_after_s(headers, now=1_700_000_000.0) == wait_s


@contextlib.contextmanager
def serving(*replies: tuple[int, bytes]) -> Iterator[str]:
    """The URL of a server that sends these statuses and bodies, one after another."""
    left = list(replies)

    class Server(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["content-length"]))
            status, body = left.pop(0)
            self.send_response(status)
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None: ...

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server) as server:
        threading.Thread(target=server.serve_forever).start()
        try:
            yield f"http://127.0.0.1:{server.server_port}/v1"
        finally:
            server.shutdown()


COMPLETION = json.dumps({"choices": [{"message": {"content": "4"}, "finish_reason": "stop"}]}).encode()


def attempt(*replies: tuple[int, bytes], text: str = "?") -> Outcome:
    """What one chat completion comes to that a real server answers so."""

    async def run(url: str) -> Outcome:
        async with connected(dataclasses.replace(TEACHER, base_url=url)) as api:
            return await transports.chat(api, {**BODY, "text": text}, lambda headers: None)

    with serving(*replies) as url:
        return asyncio.run(run(url))


def error(code: str) -> bytes:
    return json.dumps({"error": {"message": "oh", "code": code}}).encode()


@pytest.mark.parametrize(
    ("status", "body", "meaning"),
    [
        (200, COMPLETION, Response),
        (400, b"no", Failure),
        (403, b"flagged", Failure),
        (413, b"long", Failure),
        (401, b"key", Stop),
        (402, b"credit", Stop),
        (308, b"moved", Stop),
        (405, b"page", Stop),
        (404, b"model", Stop),
        (429, error("insufficient_quota"), Stop),
        (429, error("rate_limit_exceeded"), Again),
        (408, b"slow", Again),
        (409, b"conflict", Again),
        (500, b"oh", Again),
        (503, b"busy", Again),
        (200, b"<html>502 Bad Gateway</html>", Again),
        (200, b'{"error": {"message": "busy"}}', Again),
    ],
)
def test_every_status_has_one_meaning(status: int, body: bytes, meaning: type):
    outcome = attempt((status, body))
    assert type(outcome) is meaning
    if isinstance(outcome, Failure):
        assert outcome.permanent == (status != 403)  # another key, or another day, may do
    if isinstance(outcome, Again):
        assert outcome.busy == (status in (429, 503))
        assert outcome.lost == (status == 200)  # it may have been paid for


def test_a_refused_connection_was_paid_by_nobody_and_a_broken_one_may_have_been():
    async def run() -> Outcome:
        async with connected(TEACHER) as api:
            return await transports.chat(api, BODY, lambda headers: None)

    refused = asyncio.run(run())
    assert isinstance(refused, Again)
    assert (refused.lost, refused.busy) == (False, False)
    broken = attempt()  # the server reads the request and breaks off
    assert isinstance(broken, Again)
    assert broken.lost


def test_half_a_surrogate_pair_cannot_be_sent():
    with pytest.raises(UnicodeEncodeError):
        attempt(text="half an emoji: \ud83d")


def test_the_key_is_cut_out_of_what_the_server_echoes(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-very-secret-1234")
    for status in (200, 400, 500):
        outcome = attempt((status, b" " * 480 + b"sk-very-secret-1234 " + COMPLETION))
        assert "[key]" in str(outcome)
        assert "secret" not in str(outcome)
    echoed = attempt((200, COMPLETION.replace(b"4", b"you sent sk-very-secret-1234")))
    assert isinstance(echoed, Response)
    assert b"you sent [key]" in echoed.raw


@pytest.mark.parametrize(
    "url",
    [
        "http://api.example.com/v1",
        "http://127.0.0.1.example.com/v1",
        "ftp://127.0.0.1/v1",
        "api.example.com/v1",
        "",
        "https:///v1",
        "https://[::1/v1",
        "https://api.example.com:99999/v1",
        "https://api.exam ple.com/v1",
        "https://user:secret@api.example.com/v1",
        "https://api.example.com/v1?key=secret",
    ],
)
def test_unsafe_urls_are_refused_without_repeating_secrets(url: str):
    with pytest.raises(UserError, match="base_url") as caught:
        TeacherConfig(base_url=url)
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize("url", ["http://localhost:8000/v1", "http://[::1]:8000/v1", "http://127.8.0.1/v1"])
def test_loopback_needs_neither_https_nor_key(url: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    assert read_key(TeacherConfig(base_url=url)) == ""


def test_a_missing_key_is_named(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("SOME_KEY", raising=False)
    with pytest.raises(UserError, match="environment variable SOME_KEY"):
        read_key(TeacherConfig(api_key_env="SOME_KEY"))


@pytest.mark.parametrize(
    "wrong",
    [
        {"max_tokens": 0},
        {"in_flight": 0},
        {"attempt_limit": 0},
        {"timeout_s": 0.0},
        {"longest_wait_s": float("nan")},
        {"backoff_s": -1.0},
        {"output_price_usd": -1.0},
        {"input_price_usd": 1.0},
        {"larger_max_tokens": 5},
        {"refusal_limit": 0},
        {"extra": {"messages": []}},
        {"extra": {"max_completion_tokens": 5}},
    ],
    ids=str,
)
def test_config_values_are_checked(wrong: dict[str, Any]):
    with pytest.raises(UserError, match=f"teacher.{next(iter(wrong))}"):
        dataclasses.replace(TEACHER, **wrong)


def test_prompts_are_files_and_only_their_names_are_filled():
    assert "\\boxed{}" in read_prompt("long_thought.v1", COLLECT_PROMPTS)
    with pytest.raises(UserError, match=r"one of .*long_thought"):
        read_prompt("long_thought.v0", COLLECT_PROMPTS)
    filled = fill("{a} and {b} in \\boxed{}", {"a": "{b}", "b": "\\frac{1}{2}"})
    assert filled == "{b} and \\frac{1}{2} in \\boxed{}"
    assert prompt_id("p.v1", "a") == "p.v1@ca978112ca1bbdca" != prompt_id("p.v1", "b")
    assert prompt_id("", "") == ""
