"""The parts of collection that need no server: addresses, waits, reasoning fields, the ledger, the config's checks."""

import asyncio
import contextlib
import dataclasses
import email.utils
import errno
import http.server
import json
import sqlite3
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from jaxdistill.collect.client import Client, TeacherConfig, fulfil, read_key, retry_after_s
from jaxdistill.collect.ledger import Failure, Ledger, Response
from jaxdistill.collect.prompting import COLLECT_PROMPTS, fill, read_prompt
from jaxdistill.collect.reply import UnreadableReply, join_reasoning, read_reply, split_reasoning
from jaxdistill.errors import UserError
from jaxdistill.records import Usage

TEACHER = TeacherConfig(base_url="http://127.0.0.1:9/v1")
MESSAGES = ({"role": "user", "content": "What is 2 + 2?"},)


def test_requests_are_addressed_by_their_content():
    request = TEACHER.request(MESSAGES)
    others = [
        dataclasses.replace(TEACHER, model="other").request(MESSAGES),
        dataclasses.replace(TEACHER, temperature=0.5).request(MESSAGES),
        dataclasses.replace(TEACHER, extra={"reasoning_effort": "high"}).request(MESSAGES),
        TEACHER.request(({"role": "user", "content": "What is 2 + 3?"},)),
        TEACHER.request(MESSAGES, sample_index=1),
    ]
    assert len({request.key, *(other.key for other in others)}) == 6
    assert others[-1].prompt_hash == request.prompt_hash
    assert dataclasses.replace(TEACHER, in_flight=1, attempt_limit=2).request(MESSAGES).key == request.key
    assert request.body == {"model": "local-teacher", "messages": [dict(MESSAGES[0])], "max_completion_tokens": 32_768}


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


@pytest.mark.parametrize(
    ("message", "reasoning", "content"),
    [
        ({"content": " 4 ", "reasoning_content": "2 + 2"}, "2 + 2", "4"),
        ({"content": "4", "reasoning": "2 + 2"}, "2 + 2", "4"),
        ({"content": "4", "reasoning": {"effort": "low"}}, None, "4"),
        ({"content": "<think>2 + 2</think>\n4"}, "2 + 2", "4"),
        ({"content": "2 + 2\n</think>\n4"}, "2 + 2", "4"),
        ({"content": "<think>\n2 + 2 and then"}, "2 + 2 and then", ""),
        ({"content": "4", "reasoning_content": ""}, None, "4"),
        ({"content": None, "reasoning_content": "2 + 2"}, "2 + 2", ""),
        ({"content": "4"}, None, "4"),
    ],
)
def test_reasoning_is_found_wherever_servers_put_it(message: dict[str, Any], reasoning: str | None, content: str):
    assert split_reasoning(message) == (reasoning, content)
    raw = json.dumps({"choices": [{"message": message, "finish_reason": "stop"}]}).encode()
    reply = read_reply(raw)
    assert reply.reasoning_kind == ("answer_only" if reasoning is None else "full")
    assert reply.text == (content if reasoning is None else join_reasoning(reasoning, content))


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
)


@pytest.mark.parametrize("raw", [*NO_COMPLETIONS, *COMPLETIONS_OF_OTHER_KINDS])
def test_bodies_that_cannot_be_read_are_named_so(raw: bytes):
    with pytest.raises(UnreadableReply):
        read_reply(raw)


@pytest.mark.parametrize("raw", NO_COMPLETIONS)
def test_bodies_that_are_no_completion_are_asked_again(raw: bytes):
    assert isinstance(Client(TEACHER)._accept(raw, {}), tuple)


@pytest.mark.parametrize("raw", COMPLETIONS_OF_OTHER_KINDS)
def test_a_paid_answer_is_kept_even_if_it_cannot_be_read(raw: bytes):
    response = Client(TEACHER)._accept(raw, {})
    assert isinstance(response, Response)
    assert response.raw == raw


def test_counts_that_are_no_numbers_count_nothing():
    usage = {"prompt_tokens": "x", "completion_tokens": 3, "completion_tokens_details": None}
    raw = json.dumps({"choices": [{"message": {"content": "4"}, "finish_reason": "stop"}], "usage": usage}).encode()
    assert read_reply(raw).usage == Usage(output_tokens=3)
    assert read_reply(raw.replace(b'"x"', b"1e999").replace(b": 3", b": NaN")).usage == Usage()


def test_the_ledger_keeps_raw_bytes_and_asks_only_for_what_is_open(tmp_path: Path):
    requests = [TEACHER.request(MESSAGES, sample_index=i) for i in range(4)]
    with Ledger(tmp_path / "run" / "ledger.sqlite") as ledger:
        ledger.record(requests)
        ledger.record(requests)
        assert ledger.pending() == {request.key for request in requests}
        ledger.finish(requests[0].key, Response(raw=b"\xff\x00 raw", request_id="req_1", received=5.0, attempts=2))
        ledger.fail(requests[1].key, Failure(detail="HTTP 400: no", permanent=True))
        ledger.fail(requests[2].key, Failure(detail="HTTP 500: oh", permanent=False))
        with pytest.raises(KeyError):
            ledger.result("unknown")
    with Ledger(tmp_path / "run" / "ledger.sqlite") as ledger:
        assert ledger.pending() == {requests[2].key, requests[3].key}
        assert ledger.result(requests[0].key) == Response(
            raw=b"\xff\x00 raw", request_id="req_1", received=5.0, attempts=2
        )
        assert ledger.result(requests[1].key) == Failure(detail="HTTP 400: no", permanent=True, attempts=1)
        with pytest.raises(sqlite3.IntegrityError):  # an answer is never overwritten
            ledger.finish(requests[0].key, Response(raw=b"", request_id="", received=6.0))


def test_half_a_surrogate_pair_is_recorded_and_refused_without_being_sent(tmp_path: Path):
    request = TEACHER.request(({"role": "user", "content": "half an emoji: \ud83d, and é"},))
    assert request.key == "0d81b9edd3e54f9cc4e7bbe8c1c964dde631d7bead05459798cdb5edb6c94103"  # ledgers on disk hold it
    with Ledger(tmp_path / "ledger.sqlite") as ledger:
        asyncio.run(fulfil(TEACHER, ledger, {request.key: request}, lambda: None))
        failure = ledger.result(request.key)
    assert isinstance(failure, Failure)
    assert failure.permanent
    assert "surrogates not allowed" in failure.detail
    with contextlib.closing(sqlite3.connect(tmp_path / "ledger.sqlite")) as database:
        (body,) = database.execute("SELECT body FROM requests").fetchone()
    assert json.loads(body) == request.body


def test_a_full_disk_is_told_from_a_broken_ledger(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    request = TEACHER.request(MESSAGES)
    with Ledger(tmp_path / "ledger.sqlite") as ledger:
        ledger.record([request])
        (pages,) = ledger._database.execute("PRAGMA page_count").fetchone()
        ledger._database.execute(f"PRAGMA max_page_count = {pages}")
        with pytest.raises(OSError, match=r"ledger\.sqlite") as caught:
            ledger.finish(request.key, Response(raw=b"x" * 100_000, request_id="", received=5.0))
        assert caught.value.errno == errno.ENOSPC
        assert ledger.pending() == {request.key}

        def fail(*_: object) -> None:
            raise OSError(errno.ENOSPC, "full")

        monkeypatch.setattr(ledger, "fail", fail)
        with pytest.raises(OSError, match="full"):  # not in an exception group
            asyncio.run(fulfil(dataclasses.replace(TEACHER, attempt_limit=1), ledger, {request.key: request}, print))


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


@pytest.mark.parametrize("body", [b"<html>sk-very-secret-1234 busy</html>", b'{"error": {"message": "busy"}}'])
def test_a_success_without_a_completion_is_asked_again(body: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-very-secret-1234")
    with serving(*[(200, body)] * 3, (200, COMPLETION)) as url:
        teacher = dataclasses.replace(TEACHER, base_url=url, attempt_limit=2, backoff_s=0.0)
        request = teacher.request(MESSAGES)
        with Ledger(tmp_path / "ledger.sqlite") as ledger:
            asyncio.run(fulfil(teacher, ledger, {request.key: request}, lambda: None))
            failure = ledger.result(request.key)
            assert isinstance(failure, Failure)
            assert not failure.permanent
            assert "HTTP 200, but not a chat completion" in failure.detail
            assert "busy" in failure.detail
            assert "secret" not in failure.detail
            asyncio.run(fulfil(teacher, ledger, {request.key: request}, lambda: None))
            response = ledger.result(request.key)
            assert isinstance(response, Response)
            assert response.raw == COMPLETION


def test_without_credit_the_run_stops_and_the_request_stays_open(tmp_path: Path):
    with serving((402, b'{"error": {"message": "Insufficient Balance"}}'), (200, COMPLETION)) as url:
        teacher = dataclasses.replace(TEACHER, base_url=url)
        request = teacher.request(MESSAGES)
        with Ledger(tmp_path / "ledger.sqlite") as ledger:
            with pytest.raises(UserError, match=r"HTTP 402 .* out of credit; add some"):
                asyncio.run(fulfil(teacher, ledger, {request.key: request}, lambda: None))
            assert ledger.pending() == {request.key}
            asyncio.run(fulfil(teacher, ledger, {request.key: request}, lambda: None))
            assert isinstance(ledger.result(request.key), Response)


def test_one_process_at_a_time_holds_a_ledger(tmp_path: Path):
    with Ledger(tmp_path / "ledger.sqlite"), pytest.raises(UserError, match="in use by another process"):
        Ledger(tmp_path / "ledger.sqlite")
    with Ledger(tmp_path / "ledger.sqlite") as ledger:
        assert ledger.pending() == set()


def test_a_file_that_is_no_ledger_is_refused(tmp_path: Path):
    (tmp_path / "ledger.sqlite").write_bytes(b"not a database" * 100)
    with pytest.raises(UserError, match="not a usable ledger"):
        Ledger(tmp_path / "ledger.sqlite")
    assert (tmp_path / "ledger.sqlite").read_bytes() == b"not a database" * 100


@pytest.mark.parametrize(
    "url",
    [
        "http://api.example.com/v1",
        "http://127.0.0.1.example.com/v1",
        "ftp://127.0.0.1/v1",
        "api.example.com/v1",
        "",
        "https:///v1",
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
        {"extra": {"messages": []}},
        {"extra": {"max_completion_tokens": 5}},
    ],
    ids=str,
)
def test_config_values_are_checked(wrong: dict[str, Any]):
    with pytest.raises(UserError, match=f"teacher.{next(iter(wrong))}"):
        dataclasses.replace(TEACHER, **wrong)


def test_the_key_is_cut_out_of_what_the_server_echoes(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-very-secret-1234")

    async def echo() -> bytes:
        async with Client(TEACHER) as client:
            assert client._excerpt(b" " * 490 + b"sk-very-secret-1234") == " " * 490 + "[key]"
            return client._without_key(b"you sent sk-very-secret-1234")

    assert asyncio.run(echo()) == b"you sent [key]"


def test_prompts_are_files_and_only_their_names_are_filled():
    assert "\\boxed{}" in read_prompt("long_thought.v1", COLLECT_PROMPTS)
    with pytest.raises(UserError, match=r"one of .*long_thought"):
        read_prompt("long_thought.v0", COLLECT_PROMPTS)
    filled = fill("{a} and {b} in \\boxed{}", {"a": "{b}", "b": "\\frac{1}{2}"})
    assert filled == "{b} and \\frac{1}{2} in \\boxed{}"
