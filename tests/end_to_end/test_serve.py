"""`jaxdistill serve` as a process of its own, over real sockets: by OpenAI's SDK, and by clients that behave badly."""

import collections
import concurrent.futures
import contextlib
import http.client
import json
import os
import re
import select
import signal
import socket
import subprocess
import sys
import time
import urllib.parse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
import tiny
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from jaxdistill.collect.run import CollectConfig
from jaxdistill.collect.run import main as collect
from jaxdistill.collect.teacher import TeacherConfig
from jaxdistill.errors import RunError
from jaxdistill.records import Problem, write_jsonl

HF = tiny.hf_config("qwen3", vocab_size=263, max_position_embeddings=4096)
C = tiny.config("qwen3", vocab_size=263, max_position_embeddings=4096)
KEY = "secret-of-the-test"
POSITIONS, SLOTS, QUEUE = 2048, 4, 12
START_S = 300.0  # to import, load and compile on a busy machine
HEADERS = {"content-type": "application/json", "authorization": f"Bearer {KEY}"}


@contextlib.contextmanager
def serving(
    model: Path, errors: Path, *words: str, queue: int = QUEUE, positions: int = POSITIONS
) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """A server's base URL and its process, which is killed at the end if it still runs."""
    command = [sys.executable, "-m", "jaxdistill", "serve", "--model", str(model), "--port", "0", "--name", "tiny"]
    options = ["--positions", positions, "--engine.slots", SLOTS, "--engine.compute-dtype", "float32"]
    options += ["--engine.steps-per-call", 4, "--engine.page-tokens", 32, "--limits.queue", queue]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "SERVE_KEY": KEY}
    with errors.open("w") as file:
        process = subprocess.Popen(
            [*command, *map(str, options), "--api-key-env", "SERVE_KEY", *words],
            stdout=subprocess.PIPE,
            stderr=file,
            text=True,
            env=environment,
        )
    assert process.stdout
    try:
        with process.stdout:
            url = process.stdout.readline().strip()
            assert url.startswith("http://127.0.0.1:"), errors.read_text()
            yield url, process
    finally:
        process.kill()
        process.wait()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_folder(tmp_path_factory.mktemp("hf") / "hf", HF, tiny.values(C), C, with_tokenizer=True)


@pytest.fixture(scope="module")
def url(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    words = ("--limits.body-bytes", "100000", "--limits.body-s", "2", "--limits.headers-s", "4")
    with serving(model, tmp_path_factory.mktemp("serve") / "errors", *words) as (url, _):
        yield url


@pytest.fixture(scope="module")
def client(url: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=url, api_key=KEY, max_retries=0, timeout=120) as client:
        yield client


QUESTION: Any = [{"role": "user", "content": "1+1"}]


def connect(url: str) -> http.client.HTTPConnection:
    return http.client.HTTPConnection(urllib.parse.urlsplit(url).netloc, timeout=60)


def call(url: str, method: str, path: str, body: bytes | None = None, headers: Any = HEADERS) -> tuple[int, Any]:
    """Status and JSON of one request."""
    connection = connect(url)
    try:
        connection.request(method, path, body, headers)
        response = connection.getresponse()
        return response.status, json.loads(response.read())
    finally:
        connection.close()


def metric(url: str, name: str) -> float:
    connection = connect(url)
    try:
        connection.request("GET", "/metrics", headers=HEADERS)
        text = connection.getresponse().read().decode()
    finally:
        connection.close()
    found = re.search(rf"^jaxdistill_{name} (\S+)$", text, re.MULTILINE)
    assert found, text
    return float(found[1])


def wait_until_idle(url: str) -> None:
    """Until no sample holds a slot or a page."""
    deadline = time.monotonic() + 60
    while metric(url, "running_samples") or metric(url, "free_cache_pages") < metric(url, "cache_pages"):
        assert time.monotonic() < deadline, "a slot or a page is still held"
        time.sleep(0.1)


def body(**changes: Any) -> bytes:
    return json.dumps({"model": "tiny", "messages": QUESTION, "max_tokens": 5, **changes}).encode()


# --- what the SDK asks for -------------------------------------------------------------------------------------------


def test_models(client: openai.OpenAI):
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").id == "tiny"
    with pytest.raises(openai.NotFoundError, match="no model 'other' here; expected 'tiny'"):
        client.models.retrieve("other")


def test_chat_and_its_stream_say_the_same(client: openai.OpenAI):
    asked: Any = {"model": "tiny", "messages": QUESTION, "max_completion_tokens": 40, "seed": 3, "n": 3}
    whole = client.chat.completions.create(**asked)
    texts = [choice.message.content for choice in whole.choices]
    assert len(set(texts)) == 3
    assert [choice.index for choice in whole.choices] == [0, 1, 2]
    assert {choice.finish_reason for choice in whole.choices} <= {"length", "stop"}
    assert whole.usage is not None
    assert whole.usage.total_tokens == whole.usage.prompt_tokens + whole.usage.completion_tokens
    streamed, reasons, usage = ["", "", ""], {}, None
    for chunk in client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True}):
        usage = chunk.usage or usage
        for choice in chunk.choices:
            streamed[choice.index] += choice.delta.content or ""
            reasons[choice.index] = choice.finish_reason
    assert streamed == texts
    assert reasons == {choice.index: choice.finish_reason for choice in whole.choices}
    assert usage == whole.usage
    other = client.chat.completions.create(**{**asked, "seed": 4})
    assert other.choices[0].message.content != texts[0]


def test_stop_strings(client: openai.OpenAI):
    asked: Any = {"model": "tiny", "messages": QUESTION, "max_tokens": 60, "seed": 3}
    text = client.chat.completions.create(**asked).choices[0].message.content
    assert text
    stop = text[10:13]
    found = client.chat.completions.create(**asked, stop=[stop, "never said"])
    assert found.choices[0].message.content == text[: text.index(stop)]
    assert found.choices[0].finish_reason == "stop"
    assert found.usage
    assert found.usage.completion_tokens < 60
    parts = [
        chunk.choices[0].delta.content for chunk in client.chat.completions.create(**asked, stop=stop, stream=True)
    ]
    assert "".join(part or "" for part in parts) == text[: text.index(stop)]


def test_log_probabilities(client: openai.OpenAI):
    asked: Any = {"model": "tiny", "messages": QUESTION, "max_tokens": 6, "temperature": 0}
    whole = client.chat.completions.create(**asked, logprobs=True, top_logprobs=2)
    told = whole.choices[0].logprobs
    assert told is not None
    assert told.content is not None
    assert whole.usage
    assert len(told.content) == whole.usage.completion_tokens
    for one in told.content:
        assert one.logprob == one.top_logprobs[0].logprob >= one.top_logprobs[1].logprob
        assert one.bytes is None or bytes(one.bytes).decode() == one.token
    streamed = [
        one
        for chunk in client.chat.completions.create(**asked, logprobs=True, top_logprobs=2, stream=True)
        for one in (chunk.choices[0].logprobs and chunk.choices[0].logprobs.content) or []
    ]
    assert streamed == told.content


def test_completions_echo_the_log_probabilities_of_the_prompt(client: openai.OpenAI):
    """As lm-evaluation-harness asks: prompts as token ids, one more token than the prompt, the best token's beside."""
    tokens = [5, 70, 90, 200, 17]
    asked: Any = {"model": "tiny", "max_tokens": 1, "temperature": 0, "echo": True, "logprobs": 1}
    found = client.completions.create(prompt=[tokens, tokens[:3]], **asked)
    assert [choice.index for choice in found.choices] == [0, 1]
    first, second = (choice.logprobs for choice in found.choices)
    assert first is not None
    assert second is not None
    assert first.token_logprobs is not None
    assert second.token_logprobs is not None
    assert len(first.token_logprobs) == 6
    assert first.token_logprobs[0] is None  # type: ignore[comparison-overlap]
    assert first.token_logprobs[1:3] == pytest.approx(second.token_logprobs[1:3], abs=1e-5)
    assert first.top_logprobs is not None
    for value, top in list(zip(first.token_logprobs, first.top_logprobs, strict=True))[1:]:
        assert value <= max(top.values()) <= 0
    text = client.completions.create(prompt="he", **{**asked, "logprobs": None, "max_tokens": 0}).choices[0]
    assert (text.text, text.finish_reason) == ("he", "length")
    assert client.completions.create(model="tiny", prompt="he", seed=1).usage


def test_the_collect_client_takes_it_for_a_teacher(url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Random weights solve nothing; but every problem gets an answer, and what it used."""
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    write_jsonl(
        tmp_path / "problems.jsonl", [Problem(id=str(i), problem=f"{i}+1", answer=str(i + 1)) for i in range(20)]
    )
    teacher = TeacherConfig(
        base_url=url, model="tiny", max_tokens=20, backoff_s=0.1, input_price_usd=0.0, output_price_usd=1.0
    )
    config = CollectConfig(problems=tmp_path / "problems.jsonl", workdir=tmp_path / "run", teacher=teacher)
    with pytest.raises(RunError, match=r"nothing was kept \(0 verified, \d+ wrong, \d+ truncated, 0 failed"):
        collect(config)
    dropped = [json.loads(line) for line in (config.workdir / "dropped.jsonl").read_text().splitlines()]
    assert len({row["problem_id"] for row in dropped}) == 20
    assert json.loads((config.workdir / "manifest.json").read_text())["cost_usd"] > 0


# --- who is refused --------------------------------------------------------------------------------------------------


def test_the_key(url: str):
    for headers in ({}, {"authorization": "Bearer wrong"}, {"authorization": KEY}, {"authorization": "Bearer é"}):
        status, told = call(url, "POST", "/v1/chat/completions", body(), {**HEADERS, "authorization": "", **headers})
        assert (status, told["error"]["code"]) == (401, "invalid_api_key")
    assert call(url, "GET", "/v1/models", headers={})[0] == 401
    assert call(url, "GET", "/metrics", headers={})[0] == 401
    assert call(url, "GET", "/health", headers={}) == (200, {"status": "ok"})


@pytest.mark.parametrize(
    ("content", "status", "words"),
    [
        (b"{", 400, "Invalid JSON"),
        (b'{"model": "\xff\xfe"}', 400, "Invalid JSON"),
        (b"[" * 50_000, 400, "JSON"),
        (body(model="gpt"), 404, "no model 'gpt' here; expected 'tiny'"),
        (body(max_tokens=POSITIONS), 400, "2048 more were asked for; this server has 2048 positions for both"),
        (body(messages=[{"role": "user", "content": "x" * POSITIONS}]), 400, "this server has 2048 positions for both"),
        (body(n=SLOTS + QUEUE + 1), 400, "asks for 17 samples; this server takes 16 at once"),
        (body(temperature=1e-30), 400, "temperature is 1e-30"),
        (body(repetition_penalty=0), 400, "repetition_penalty is 0.0"),
        (body(tools=[]), 400, "tools: this server has no such field"),
        (b" " * 100_001, 413, "longer than 100000 bytes"),
    ],
)
def test_bodies_that_are_refused(url: str, content: bytes, status: int, words: str):
    found, told = call(url, "POST", "/v1/chat/completions", content)
    assert found == status
    assert words in told["error"]["message"]


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.sampled_from(["", "a", "user", "\ud800", "\x00"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["role", "content", "type"]), inner),
    max_leaves=4,
)
SETTINGS = st.fixed_dictionaries(
    {},
    optional={
        "temperature": st.floats(0, 2) | JSON,
        "top_p": st.floats(0, 1) | JSON,
        "top_k": st.integers(-1, 2**33) | JSON,
        "min_p": st.floats(0, 1) | JSON,
        "presence_penalty": st.floats(-2, 2) | JSON,
        "frequency_penalty": st.floats(-2, 2) | JSON,
        "repetition_penalty": st.floats(0, 1e7) | JSON,
        "n": st.integers(0, 3) | JSON,
        "seed": st.integers(-(2**64), 2**64) | JSON,
        "stop": st.sampled_from(["a", ["a", "b"]]) | JSON,
        "logprobs": st.sampled_from([True, 1]) | JSON,
        "top_logprobs": st.integers(-1, 21) | JSON,
        "echo": st.booleans() | JSON,
        "stream": st.booleans() | JSON,
    },
)


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
def test_settings_of_any_value_are_answered_or_refused(url: str, path: str, full_size: bool):
    """Never a 500, never a hang, and the server is as healthy afterwards."""
    statuses: collections.Counter[int] = collections.Counter()

    @settings(max_examples=500 if full_size else 50, deadline=None, suppress_health_check=[HealthCheck.too_slow])
    @given(changes=SETTINGS, prompt=st.sampled_from(["he", [1, 2]]) | JSON, messages=st.just(QUESTION) | JSON)
    def ask(changes: dict[str, Any], prompt: Any, messages: Any) -> None:
        subject = {"messages": messages} if "chat" in path else {"prompt": prompt}
        content = json.dumps({"model": "tiny", "max_tokens": 3, **subject, **changes}).encode()
        connection = connect(url)
        try:
            connection.request("POST", path, content, HEADERS)
            response = connection.getresponse()
            told = response.read().decode()
        finally:
            connection.close()
        statuses[response.status] += 1
        if response.status != 200:
            assert response.status == 400
            assert json.loads(told)["error"]["message"]

    ask()
    assert statuses[200] > 0
    assert statuses[400] > 0
    wait_until_idle(url)


def test_it_does_what_its_openapi_document_says(url: str, full_size: bool, tmp_path: Path):
    """schemathesis reads the document, makes calls that fit it and calls that do not, and checks what comes back."""
    command = [Path(sys.executable).with_name("schemathesis"), "run", f"{url.removesuffix('/v1')}/openapi.json"]
    # A body that fits the document may still have no room: a prompt too long, more samples than the queue holds
    options = ["--exclude-checks", "positive_data_acceptance", "--header", f"Authorization: Bearer {KEY}"]
    options += ["--max-examples", "200" if full_size else "15", "--seed", "1", "--warnings", "off", "--no-color"]
    found = subprocess.run([*command, *options], cwd=tmp_path, capture_output=True, text=True, timeout=1800)
    assert found.returncode == 0, found.stdout[-5000:] + found.stderr[-2000:]
    assert "Tested: 6" in found.stdout
    wait_until_idle(url)


@pytest.mark.parametrize(
    ("prompt", "words"),
    [
        ([], "prompt"),
        ([[]], "prompt"),
        ("", "no tokens"),
        ([-1], "outside the model's vocabulary"),
        ([2**70], "outside the model's vocabulary"),
        ([263], "token 263 is outside the model's vocabulary of 263"),
        ({"a": 1}, "prompt"),
        ([[1]] * 10_000, "asks for 10000 samples; this server takes 16 at once"),
    ],
)
def test_prompts_that_are_refused(url: str, prompt: Any, words: str):
    status, told = call(url, "POST", "/v1/completions", json.dumps({"model": "tiny", "prompt": prompt}).encode())
    assert status == 400
    assert words in told["error"]["message"]


def test_paths_methods_and_types_that_are_refused(url: str):
    assert call(url, "GET", "/v1/chat/completions")[0] == 405
    assert call(url, "GET", "/nowhere/%ff%00")[0] == 404
    assert call(url, "POST", "/v1/completions", b"{}", {**HEADERS, "content-type": "text/plain"})[0] == 415


def test_a_body_that_does_not_come_is_not_waited_for(url: str):
    address = urllib.parse.urlsplit(url)
    assert address.hostname
    assert address.port
    with socket.create_connection((address.hostname, address.port), timeout=60) as slow:
        lines = [f"{name}: {value}\r\n" for name, value in {**HEADERS, "host": "x", "content-length": "100"}.items()]
        slow.sendall(f"POST /v1/completions HTTP/1.1\r\n{''.join(lines)}\r\n{{".encode())
        assert slow.recv(1000).startswith(b"HTTP/1.1 408 ")


def test_headers_that_do_not_come_are_not_waited_for(url: str):
    """Not those of a connection's first request, and not of one that follows an answer."""
    address = urllib.parse.urlsplit(url)
    whole, part = b"GET /health HTTP/1.1\r\nhost: x\r\n\r\n", b"GET /health HTTP/1.1\r\nho"
    assert address.hostname
    assert address.port
    for before in ((), (whole,)):
        with socket.create_connection((address.hostname, address.port), timeout=60) as slow:
            for request in before:
                slow.sendall(request)
                answer = b""
                while not answer.endswith(b"}"):
                    answer += slow.recv(10_000)
            slow.sendall(part)
            assert slow.recv(1000).startswith(b"HTTP/1.1 408 ")
            assert slow.recv(1000) == b""


# --- load, and clients that leave ------------------------------------------------------------------------------------


def test_more_than_there_is_room_for_gets_a_429_and_nothing_is_lost(client: openai.OpenAI, url: str):
    def one(i: int) -> str:
        try:
            answer = client.chat.completions.create(model="tiny", messages=QUESTION, max_tokens=100, seed=i)
        except openai.RateLimitError as error:
            return f"refused for {error.response.headers['retry-after']} s"
        assert answer.choices[0].finish_reason in ("stop", "length")
        return "answered"

    with concurrent.futures.ThreadPoolExecutor(60) as pool:
        found = list(pool.map(one, range(60)))
    assert set(found) == {"answered", "refused for 1 s"}
    wait_until_idle(url)
    assert one(0) == "answered"


def test_a_client_that_leaves_frees_its_slots(url: str):
    before = metric(url, "disconnects_total")
    for stream in (True, False):
        connection, running = connect(url), False
        while not running:  # once more where a busy machine looks only after the answer is there
            connection.close()
            connection = connect(url)
            connection.request("POST", "/v1/chat/completions", body(max_tokens=1900, n=2, stream=stream), HEADERS)
            if stream:
                assert connection.getresponse().read(10).startswith(b"data: ")
                running = True
            while not running and not select.select([connection.sock], [], [], 0.01)[0]:
                running = metric(url, "running_samples") > 0
        connection.close()
        connection.sock = None
        wait_until_idle(url)
    assert metric(url, "disconnects_total") == before + 2


def test_sigterm_finishes_what_is_under_way(model: Path, tmp_path: Path):
    with (
        serving(model, tmp_path / "errors") as (url, process),
        openai.OpenAI(base_url=url, api_key=KEY, max_retries=0) as client,
    ):
        stream = client.chat.completions.create(
            model="tiny", messages=QUESTION, max_tokens=300, stream=True, extra_body={"min_p": 0.01}
        )
        parts = [next(stream)]
        process.send_signal(signal.SIGTERM)
        parts += list(stream)
        assert parts[-1].choices[0].finish_reason in ("length", "stop")
        assert len(parts) > 2
        assert process.wait(60) == 0
        with pytest.raises(OSError, match="refused"):
            connect(url).connect()
    assert "Traceback" not in (tmp_path / "errors").read_text()
