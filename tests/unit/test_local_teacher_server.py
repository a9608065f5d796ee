"""The local teacher over real HTTP: shapes, faults at their rates, bad bodies, the end of the process."""

import collections
import http.client
import json
import os
import signal
import subprocess
import sys
import time
import urllib.parse
from pathlib import Path
from typing import Any

import pytest
from rows import log_entries

from jaxdistill.collect.reply import read_reply
from jaxdistill.local_teacher.answers import MODEL, Faults, answer
from jaxdistill.local_teacher.problems import generate
from jaxdistill.local_teacher.server import TeacherOptions, running_teacher
from jaxdistill.verify import extract_answer


def body_of(text: str, **parameters: Any) -> dict[str, Any]:
    return {"model": MODEL, "messages": [{"role": "user", "content": text}], **parameters}


class Connection:
    """One HTTP connection to a server."""

    def __init__(self, base_url: str):
        self.netloc = urllib.parse.urlsplit(base_url).netloc
        self.http = http.client.HTTPConnection(self.netloc, timeout=30)

    def call(self, method: str, path: str, body: bytes | None = None) -> tuple[int, dict[str, str], Any]:
        self.http.request(method, path, body, {"content-type": "application/json"})
        response = self.http.getresponse()
        headers = {name.lower(): value for name, value in response.getheaders()}
        return response.status, headers, json.loads(response.read())

    def chat(self, body: Any) -> tuple[int, dict[str, str], Any]:
        raw = body if isinstance(body, bytes) else json.dumps(body).encode()
        return self.call("POST", "/v1/chat/completions", raw)


@pytest.fixture(scope="module")
def good():
    with running_teacher() as base_url:
        connection = Connection(base_url)
        yield connection
        connection.http.close()


def test_every_statement_is_solved_from_its_text(good: Connection):
    for problem in generate("all", 300, seed=9, split="heldout"):
        status, headers, reply = good.chat(body_of(f"Think aloud.\n{problem.problem}"))
        assert status == 200
        message = reply["choices"][0]["message"]
        assert extract_answer(message["content"]) == problem.answer
        assert "Plan" in message["reasoning_content"]
        usage = reply["usage"]
        assert 0 < usage["completion_tokens_details"]["reasoning_tokens"] < usage["completion_tokens"]
        assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
        assert headers["x-request-id"].startswith("req_")
        assert int(headers["x-ratelimit-remaining-requests"]) >= 0


def test_reformat_requests_get_coarse_solutions(good: Connection):
    problem = generate("turns", 1, seed=0, split="train")[0]
    reply = good.chat(body_of(f"Rewrite the solution step by step.\n{problem.problem}\n{problem.solution}"))[2]
    message = reply["choices"][0]["message"]
    assert "reasoning_content" not in message
    assert message["content"].startswith("Step 1:")
    assert extract_answer(message["content"]) == problem.answer


def test_unknown_problems_get_no_box(good: Connection):
    message = good.chat(body_of("Prove the Riemann hypothesis."))[2]["choices"][0]["message"]
    assert "do not know" in message["content"]
    assert "boxed" not in message["content"]


@pytest.mark.parametrize("name", ["max_tokens", "max_completion_tokens"])
def test_token_limits_are_kept(good: Connection, name: str):
    problem = generate("relay", 1, seed=0, split="train")[0]
    reply = good.chat(body_of(problem.problem, **{name: 20}))[2]
    assert reply["choices"][0]["finish_reason"] == "length"
    assert reply["usage"]["completion_tokens"] == 20


def test_models_health_and_unknown_paths(good: Connection):
    assert good.call("GET", "/v1/models")[2]["data"][0]["id"] == MODEL
    assert good.call("GET", "/health")[2]["status"] == "ok"
    assert good.call("GET", "/v1/nowhere")[0] == 404
    assert good.call("GET", "/v1/chat/completions")[0] == 405


DEEP = b'{"messages": ' + b"[" * 100_000 + b"]" * 100_000 + b"}"


@pytest.mark.parametrize(
    ("body", "status", "words"),
    [
        (b"", 400, "JSON"),
        (b"{", 400, "JSON"),
        (b"\xff\xfe", 400, "JSON"),
        (b"[]", 400, "list"),
        (DEEP, 400, "JSON"),
        (b" " * (2 << 20), 413, "longer"),
        ({"messages": []}, 400, "model"),
        ({"model": 3, "messages": []}, 400, "model"),
        ({"model": "gpt", "messages": []}, 404, "does not exist"),
        ({"model": "\ud800", "messages": []}, 404, "does not exist"),
        ({"model": MODEL}, 400, "messages"),
        ({"model": MODEL, "messages": "hi"}, 400, "messages"),
        ({"model": MODEL, "messages": [1]}, 400, "messages[0]"),
        ({"model": MODEL, "messages": [{"role": "user"}]}, 400, "messages[0]"),
        ({"model": MODEL, "messages": [{"role": "pope", "content": "x"}]}, 400, "role"),
        (body_of("x", max_tokens=0), 400, "max_tokens"),
        (body_of("x", max_tokens=True), 400, "max_tokens"),
        (body_of("x", temperature=3), 400, "temperature"),
        (body_of("x", temperature="hot"), 400, "temperature"),
        (body_of("x", temperature=float("nan")), 400, "temperature"),
        (body_of("x", stream=True), 400, "stream"),
        (body_of("x", n=2), 400, "once"),
    ],
    ids=str,
)
def test_bad_bodies_are_refused_clearly(good: Connection, body: Any, status: int, words: str):
    fresh = Connection(f"http://{good.netloc}")  # the server may close a connection whose body it did not read
    got, _, reply = fresh.chat(body)
    fresh.http.close()
    assert got == status
    assert words in reply["error"]["message"]
    assert set(reply["error"]) == {"message", "type", "param", "code"}


def test_faults_come_at_their_rates_and_the_log_tells_them(tmp_path: Path):
    log = tmp_path / "log.jsonl"
    faults = Faults(rate_limited=0.1, server_error=0.05, truncated=0.1, wrong=0.15)
    problems = generate("all", 1000, seed=5, split="train")
    seen: collections.Counter[str] = collections.Counter()
    with running_teacher(TeacherOptions(seed=1, faults=faults, retry_after_s=7, log=log)) as base_url:
        connection = Connection(base_url)
        for problem in problems:
            status, headers, reply = connection.chat(body_of(problem.problem))
            if status != 200:
                seen[{429: "rate_limited", 500: "server_error"}[status]] += 1
                assert headers.get("retry-after") == ("7" if status == 429 else None)
                assert reply["error"]["message"]
            elif reply["choices"][0]["finish_reason"] == "length":
                seen["truncated"] += 1
            else:
                right = extract_answer(read_reply(json.dumps(reply).encode()).text) == problem.answer
                seen["right" if right else "wrong"] += 1
        connection.http.close()
    expected = {"rate_limited": 100, "server_error": 50, "truncated": 100, "wrong": 150, "right": 600}
    for outcome, count in expected.items():
        assert abs(seen[outcome] - count) < 4 * count**0.5, (outcome, seen)
    entries = log_entries(log)
    assert collections.Counter(entry["outcome"] for entry in entries) == seen
    again = [answer(body_of(p.problem), 1, 1, faults).outcome for p in problems]
    assert [entry["outcome"] for entry in entries] == again  # drawn from seed, body and attempt: the same anywhere


def test_fault_rates_are_checked():
    with pytest.raises(ValueError, match="fault rate wrong"):
        Faults(wrong=1.5)
    with pytest.raises(ValueError, match="add up to"):
        Faults(wrong=0.6, truncated=0.6)
    done = subprocess.run(
        [sys.executable, "-m", "jaxdistill.local_teacher.server", "--wrong-rate=2"], capture_output=True, text=True
    )
    assert done.returncode == 2
    assert "fault rate wrong is 2.0" in done.stderr


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_the_server_ends_when_its_parent_is_killed():
    program = """
import http.client, time
from jaxdistill.local_teacher.server import running_teacher
with running_teacher() as base_url:
    print(base_url, flush=True)
    time.sleep(600)
"""
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) as parent:
        try:
            assert parent.stdout
            connection = Connection(parent.stdout.readline().strip())
            request_id = connection.chat(body_of("hello"))[1]["x-request-id"]
            connection.http.close()
            server = int(request_id.split("_")[1])
            assert _alive(server)
        finally:
            parent.send_signal(signal.SIGKILL)
    deadline = time.monotonic() + 20
    while _alive(server) and time.monotonic() < deadline:
        if Path(f"/proc/{server}/stat").is_file() and " Z " in Path(f"/proc/{server}/stat").read_text():
            break  # ended, and waits for an init process that collects it
        time.sleep(0.05)
    else:
        assert not _alive(server)
