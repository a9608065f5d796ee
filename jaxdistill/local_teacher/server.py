"""The local teacher as a real server process: OpenAI's chat-completions shape over HTTP on loopback."""

import argparse
import asyncio
import collections
import contextlib
import dataclasses
import hashlib
import hmac
import json
import math
import os
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jaxdistill.local_teacher.answers import MODEL, Answer, BadRequest, Faults, answer, body_hash, check, completion

START_S = 60.0  # limit for the server process to say that it listens; slow only on a busy disk
BODY_BYTES = 1 << 20  # largest request body read


@dataclasses.dataclass(frozen=True, kw_only=True)
class TeacherOptions:
    """How the server behaves."""

    seed: int = 0  # of every draw: faults, wrong turns, slips
    faults: Faults = dataclasses.field(default_factory=Faults)
    latency_s: float = 0.0  # seconds from a request to its answer
    retry_after_s: int = 1  # seconds a 429 asks to wait
    requests_per_minute: int = 100_000  # told in the x-ratelimit headers; not enforced
    key_sha256: str = ""  # SHA-256 of the only key let in, in hexadecimal; empty lets everybody in
    log: Path | None = None  # JSON Lines, one object a request

    def __post_init__(self) -> None:
        if self.latency_s < 0 or self.retry_after_s < 0:
            raise ValueError(
                f"latency_s is {self.latency_s} and retry_after_s {self.retry_after_s}, expected 0 or more"
            )


class Teacher:
    """The handlers and what they remember: attempts per body, the last minute's requests, the log."""

    def __init__(self, options: TeacherOptions):
        self.options = options
        self.attempts: collections.Counter[str] = collections.Counter()
        self.recent: collections.deque[float] = collections.deque()
        self.served = 0
        self.log = options.log.open("a", encoding="utf-8", buffering=1) if options.log else None

    def app(self) -> Any:
        """The Starlette application."""
        from starlette.applications import Starlette
        from starlette.exceptions import HTTPException
        from starlette.responses import JSONResponse
        from starlette.routing import Route

        async def models(request: Any) -> Any:
            return JSONResponse(
                {"object": "list", "data": [{"id": MODEL, "object": "model", "owned_by": "jaxdistill"}]}
            )

        async def health(request: Any) -> Any:
            return JSONResponse({"status": "ok", "served": self.served})

        async def http_error(request: Any, error: Any) -> Any:
            words = f"{request.method} {request.url.path}: {error.detail}"
            return JSONResponse(_error(words, "invalid_request_error"), error.status_code)

        return Starlette(
            routes=[
                Route("/v1/chat/completions", self.chat, methods=["POST"]),
                Route("/v1/models", models),
                Route("/health", health),
            ],
            exception_handlers={HTTPException: http_error},
        )

    async def chat(self, request: Any) -> Any:
        """Answers POST /v1/chat/completions."""
        from starlette.responses import JSONResponse

        received = time.time()
        self.served += 1
        request_id = f"req_{os.getpid()}_{self.served}"
        headers = {"x-request-id": request_id, **self._rate_headers(received)}
        entry: dict[str, Any] = {"request_id": request_id, "received": received}
        try:
            self._let_in(request.headers.get("authorization", ""))
            body = check(await _read(request))
        except BadRequest as error:
            self._write(entry, status=error.status, outcome="refused", message=str(error))
            content = _error(str(error), "invalid_request_error", error.param, error.code)
            return JSONResponse(content, error.status, headers)
        key = body_hash(body)
        self.attempts[key] += 1
        attempt = self.attempts[key]
        if self.options.latency_s:
            await asyncio.sleep(self.options.latency_s)
        reply = answer(body, attempt, self.options.seed, self.options.faults)
        status, content = self._content(body, reply, request_id)
        if status == 429:
            headers["retry-after"] = str(self.options.retry_after_s)
        self._write(entry, status=status, outcome=reply.outcome, body_sha256=key, attempt=attempt)
        return JSONResponse(content, status, headers)

    def _content(self, body: dict[str, Any], reply: Answer, request_id: str) -> tuple[int, dict[str, Any]]:
        if reply.outcome == "rate_limited":
            return 429, _error("Rate limit reached for requests.", "requests", code="rate_limit_exceeded")
        if reply.outcome == "server_error":
            return 500, _error("The server had an error while processing your request.", "server_error")
        return 200, completion(body, reply, request_id, int(time.time()))

    def _let_in(self, authorization: str) -> None:
        expected = self.options.key_sha256
        given = hashlib.sha256(authorization.removeprefix("Bearer ").encode()).hexdigest()
        if expected and not hmac.compare_digest(given, expected):
            raise BadRequest("Incorrect API key provided.", status=401, code="invalid_api_key")

    def _rate_headers(self, now: float) -> dict[str, str]:
        self.recent.append(now)
        while self.recent[0] < now - 60:
            self.recent.popleft()
        limit = self.options.requests_per_minute
        return {
            "x-ratelimit-limit-requests": str(limit),
            "x-ratelimit-remaining-requests": str(max(0, limit - len(self.recent))),
            "x-ratelimit-reset-requests": f"{math.ceil(60 - (now - self.recent[0]))}s",
        }

    def _write(self, entry: dict[str, Any], **facts: Any) -> None:
        if self.log:
            self.log.write(json.dumps({**entry, **facts, "answered": time.time()}) + "\n")


async def _read(request: Any) -> bytes:
    """The request body, refused as soon as it is too long."""
    body = bytearray()
    async for piece in request.stream():
        body += piece
        if len(body) > BODY_BYTES:
            raise BadRequest(f"The body is longer than {BODY_BYTES} bytes.", status=413)
    return bytes(body)


def _error(message: str, kind: str, param: str | None = None, code: str | None = None) -> dict[str, Any]:
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


@contextlib.contextmanager
def running_teacher(options: TeacherOptions | None = None) -> Iterator[str]:
    """Runs the teacher in a process of its own and yields its base URL, such as http://127.0.0.1:41234/v1.

    The process ends with the block, and also when this process is killed: it watches a pipe that only this one holds.

    Raises:
      RuntimeError: it did not start; the message ends with what it wrote on standard error.
    """
    options = options or TeacherOptions()
    with tempfile.TemporaryDirectory(prefix="jaxdistill-teacher-") as folder:
        ready, errors = Path(folder, "ready"), Path(folder, "errors")
        command = [sys.executable, "-m", "jaxdistill.local_teacher.server", "--ready-file", str(ready)]
        with errors.open("wb") as error_file:
            process = subprocess.Popen(
                [*command, "--end-with-stdin", *_arguments(options)],
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=error_file,
                env={**os.environ, "PYTHONPATH": _python_path()},
                start_new_session=True,  # Ctrl-C ends the collector first, which then ends the teacher
            )
        try:
            deadline = time.monotonic() + START_S
            while not ready.exists():
                if process.poll() is not None or time.monotonic() > deadline:
                    raise RuntimeError(f"the local teacher did not start: {errors.read_text()[-2000:]}")
                time.sleep(0.02)
            yield ready.read_text().strip()
        finally:
            process.kill()
            assert process.stdin
            process.stdin.close()
            process.wait()


def _python_path() -> str:
    root = str(Path(__file__).resolve().parent.parent.parent)
    return os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])


def _arguments(options: TeacherOptions) -> list[str]:
    """The command-line form of the options; `_options` reads it back."""
    values = {f.name: getattr(options, f.name) for f in dataclasses.fields(options) if f.name not in ("faults", "log")}
    values |= {f"{name}_rate": rate for name, rate in dataclasses.asdict(options.faults).items()}
    if options.log:
        values["log"] = options.log.resolve()
    return [f"--{name.replace('_', '-')}={value}" for name, value in values.items()]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m jaxdistill.local_teacher.server", description=__doc__)
    parser.add_argument("--port", type=int, default=0, help="port on 127.0.0.1; 0 takes a free one")
    parser.add_argument("--ready-file", type=Path, help="file that receives the base URL once the server listens")
    parser.add_argument("--end-with-stdin", action="store_true", help="end when standard input is closed")
    parser.add_argument("--log", type=Path, help="JSON Lines file, one object a request")
    for field in dataclasses.fields(TeacherOptions):
        if field.name not in ("faults", "log"):
            assert not isinstance(field.default, dataclasses._MISSING_TYPE)
            parser.add_argument(f"--{field.name.replace('_', '-')}", type=type(field.default), default=field.default)
    for field in dataclasses.fields(Faults):
        parser.add_argument(f"--{field.name.replace('_', '-')}-rate", type=float, default=field.default)
    return parser


def _options(arguments: argparse.Namespace) -> TeacherOptions:
    values = vars(arguments)
    return TeacherOptions(
        faults=Faults(**{f.name: values[f"{f.name}_rate"] for f in dataclasses.fields(Faults)}),
        **{f.name: values[f.name] for f in dataclasses.fields(TeacherOptions) if f.name != "faults"},
    )


def _end_with_stdin() -> None:
    sys.stdin.buffer.read()
    os._exit(0)  # the log is written line by line: nothing is lost


def main() -> None:
    """Serves until it is stopped."""
    import uvicorn

    parser = _parser()
    arguments = parser.parse_args()
    try:
        options = _options(arguments)
    except ValueError as error:
        parser.error(str(error))
    listener = socket.create_server(("127.0.0.1", arguments.port), backlog=1024)
    base_url = f"http://127.0.0.1:{listener.getsockname()[1]}/v1"
    if arguments.end_with_stdin:
        threading.Thread(target=_end_with_stdin, daemon=True).start()
    teacher = Teacher(options)
    print(base_url, flush=True)
    if arguments.ready_file:
        partial = arguments.ready_file.with_name(arguments.ready_file.name + ".partial")
        partial.write_text(base_url + "\n")
        partial.replace(arguments.ready_file)
    config = uvicorn.Config(teacher.app(), log_level="warning", access_log=False, lifespan="off")
    uvicorn.Server(config).run(sockets=[listener])


if __name__ == "__main__":
    main()
