"""What the local teacher answers over HTTP: chat completions, Responses, background answers, files and batches."""

import asyncio
import collections
import dataclasses
import hashlib
import hmac
import json
import os
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from jaxdistill.local_teacher.answers import (
    MODEL,
    PRICES_USD,
    BadRequest,
    Faults,
    answer,
    body_hash,
    check,
    completion,
    response_object,
)
from jaxdistill.local_teacher.batches import LARGEST_BYTES, Batches
from jaxdistill.local_teacher.limits import Limit

BODY_BYTES = 1 << 20  # largest request body read


@dataclasses.dataclass(frozen=True, kw_only=True)
class TeacherOptions:
    """How the server behaves."""

    seed: int = 0  # of every draw: faults, wrong turns, slips
    faults: Faults = dataclasses.field(default_factory=Faults)
    latency_s: float = 0.0  # seconds from a request to its answer
    retry_after_s: int = 1  # seconds a 429 asks to wait
    requests_per_minute: int = 100_000  # told in the x-ratelimit headers
    tokens_per_minute: int = 100_000_000  # as above; an answer counts once it is made
    minute_s: float = 60.0  # seconds in a minute of the limits; shorter for tests
    enforce_limits: bool = False  # answer 429 to what is over them
    batch_s: float = 0.0  # seconds that a batch takes
    batch_expired: float = 0.0  # share of a batch's requests that come too late
    key_sha256: str = ""  # SHA-256 of the only key let in, in hexadecimal; empty lets everybody in
    log: Path | None = None  # JSON Lines, one object a request
    script: Path | None = None  # JSON Lines: what happens to the first, second, ... request; see Teacher.scripted

    def __post_init__(self) -> None:
        if self.latency_s < 0 or self.retry_after_s < 0:
            raise ValueError(
                f"latency_s is {self.latency_s} and retry_after_s {self.retry_after_s}, expected 0 or more"
            )


class Teacher:
    """The handlers and what they remember: attempts per body, limits, answers in the background, batches, the log."""

    def __init__(self, options: TeacherOptions):
        self.options = options
        self.attempts: collections.Counter[str] = collections.Counter()
        self.requests = Limit("requests", options.requests_per_minute, options.minute_s)
        self.tokens = Limit("tokens", options.tokens_per_minute, options.minute_s)
        self.background: dict[str, tuple[float, dict[str, Any]]] = {}  # when an answer is ready, and the answer
        self.batches = Batches(self._answer_in_batch, options.batch_s, options.batch_expired, options.seed)
        self.served = 0
        self.log = options.log.open("a", encoding="utf-8", buffering=1) if options.log else None
        lines = options.script.read_text(encoding="utf-8").splitlines() if options.script else []
        script = [json.loads(line) for line in lines]
        self.script = collections.deque(line for line in script if "at" not in line)
        self.script_at = [line for line in script if "at" in line]

    def app(self) -> Any:
        """The Starlette application."""
        from starlette.applications import Starlette
        from starlette.exceptions import HTTPException
        from starlette.responses import JSONResponse, Response
        from starlette.routing import Route

        async def models(request: Any) -> Any:
            pricing = dict(zip(("prompt", "completion"), (f"{usd / 1e6:.8f}" for usd in PRICES_USD), strict=True))
            model = {"id": MODEL, "object": "model", "owned_by": "jaxdistill", "pricing": pricing}
            return JSONResponse({"object": "list", "data": [model]})

        async def health(request: Any) -> Any:
            return JSONResponse({"status": "ok", "served": self.served})

        async def upload(request: Any) -> Any:
            body = await _read(request, LARGEST_BYTES + BODY_BYTES)
            return JSONResponse(self.batches.upload(request.headers.get("content-type", ""), body))

        async def content(request: Any) -> Any:
            if (name := request.path_params["name"]) not in self.batches.files:
                raise BadRequest(f"There is no file {name!r:.80}.", status=404)
            return Response(self.batches.files[name], media_type="application/octet-stream")

        async def new_batch(request: Any) -> Any:
            return JSONResponse(self.batches.create(json.loads(await _read(request))))

        async def batch(request: Any) -> Any:
            return JSONResponse(self.batches.show(request.path_params["name"]))

        async def all_batches(request: Any) -> Any:
            query = request.query_params
            return JSONResponse(self.batches.listing(query.get("after"), int(query.get("limit", "20"))))

        async def http_error(request: Any, error: Any) -> Any:
            words = f"{request.method} {request.url.path}: {error.detail}"
            return JSONResponse(_error(words, "invalid_request_error"), error.status_code)

        async def bad_request(request: Any, error: Any) -> Any:
            content = _error(str(error), "invalid_request_error", error.param, error.code)
            return JSONResponse(content, error.status)

        def guarded(handler: Any) -> Any:
            async def handle(request: Any) -> Any:
                self._let_in(request.headers.get("authorization", ""))
                line = self._scripted_at(f"{request.method} {request.url.path}")
                if line and not line.get("done"):
                    return _as_scripted(line, {})
                answer = await handler(request)
                return _as_scripted(line, {}) if line else answer

            return handle

        return Starlette(
            routes=[
                Route("/v1/chat/completions", self.generate, methods=["POST"]),
                Route("/v1/responses", self.generate, methods=["POST"]),
                Route("/v1/responses/{name}", guarded(self.poll)),
                Route("/v1/files", guarded(upload), methods=["POST"]),
                Route("/v1/files/{name}/content", guarded(content)),
                Route("/v1/batches", guarded(new_batch), methods=["POST"]),
                Route("/v1/batches", guarded(all_batches)),
                Route("/v1/batches/{name}", guarded(batch)),
                Route("/v1/models", models),
                Route("/health", health),
            ],
            exception_handlers={HTTPException: http_error, BadRequest: bad_request},
        )

    async def generate(self, request: Any) -> Any:
        """Answers POST /v1/chat/completions and POST /v1/responses."""
        from starlette.responses import JSONResponse

        request_id, entry = self._new_request()
        allowed = self.requests.take(1.0, self.options.enforce_limits)
        allowed = self.tokens.take(1.0, self.options.enforce_limits) and allowed
        headers = {"x-request-id": request_id, **self.requests.headers(), **self.tokens.headers()}
        through_responses = request.url.path == "/v1/responses"
        try:
            self._let_in(request.headers.get("authorization", ""))
            body = check(await _read(request), through_responses)
        except BadRequest as error:
            self._write(entry, status=error.status, outcome="refused", message=str(error))
            content = _error(str(error), "invalid_request_error", error.param, error.code)
            return JSONResponse(content, error.status, headers)
        if not allowed:
            wait_s = 1.0 / self.requests.per_s
            self._write(entry, status=429, outcome="over_limit", body_sha256=body_hash(body))
            error = _error("Rate limit reached for requests.", "requests", code="rate_limit_exceeded")
            return JSONResponse(error, 429, {**headers, "retry-after-ms": f"{wait_s * 1000:.0f}"})
        if (scripted := await self.scripted(body, entry, headers)) is not None:
            return scripted
        in_background = through_responses and body.get("background") is True
        if self.options.latency_s and not in_background:
            await asyncio.sleep(self.options.latency_s)
        status, content = self._answer(body, request_id, entry)
        if status == 429:
            headers["retry-after"] = str(self.options.retry_after_s)
        if in_background and status == 200:
            self.background[content["id"]] = (time.time() + self.options.latency_s, content)
            content = {**content, "status": "queued", "output": [], "usage": None}
        return JSONResponse(content, status, headers)

    async def scripted(self, body: dict[str, Any], entry: dict[str, Any], headers: dict[str, str]) -> Any:
        """What the script says about this request, None if it is to be answered as usual.

        A line holds `status` with `body` (a text) or `code` (of an error), `headers`, and `delay_s`; or `drop`, which
        breaks the connection off in the middle of the answer. An empty object leaves the request alone. A line with
        `at`, such as "GET /v1/files", is for the next request to a path that begins so, polls, files and batches, and
        stands aside from the others; with `done` that request is carried out, and its answer alone is replaced.
        """
        line = self.script.popleft() if self.script else {}
        await asyncio.sleep(line.get("delay_s", 0.0))
        if not line.keys() & {"drop", "status"}:
            return None
        status, outcome = (0, "dropped") if line.get("drop") else (line["status"], "scripted")
        self._write(entry, status=status, outcome=outcome, body_sha256=body_hash(body))
        return _as_scripted(line, headers)

    def _scripted_at(self, place: str) -> dict[str, Any] | None:
        found = next((line for line in self.script_at if place.startswith(line["at"])), None)
        if found is not None:
            self.script_at.remove(found)
        return found

    async def poll(self, request: Any) -> Any:
        """Answers GET /v1/responses/{id}."""
        from starlette.responses import JSONResponse

        name = request.path_params["name"]
        if name not in self.background:
            raise BadRequest(f"There is no response {name!r:.80}.", status=404)
        ready, content = self.background[name]
        if time.time() < ready:
            content = {**content, "status": "in_progress", "output": [], "usage": None}
        return JSONResponse(content, 200, {"x-request-id": "req_" + name.removeprefix("resp_")})

    def _answer_in_batch(self, endpoint: str, body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        request_id, entry = self._new_request()
        entry["batch"] = endpoint
        try:
            checked = check(json.dumps(body).encode(), endpoint == "/v1/responses")
        except BadRequest as error:
            self._write(entry, status=error.status, outcome="refused", message=str(error))
            return error.status, _error(str(error), "invalid_request_error", error.param, error.code)
        return self._answer(checked, request_id, entry)

    def _new_request(self) -> tuple[str, dict[str, Any]]:
        """Id and log entry of the next request."""
        self.served += 1
        request_id = f"req_{os.getpid()}_{self.served}"
        return request_id, {"request_id": request_id, "received": time.time()}

    def _answer(self, body: dict[str, Any], request_id: str, entry: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        """Status and content for a body that was checked; writes it into the log."""
        key = body_hash(body)
        self.attempts[key] += 1
        attempt = self.attempts[key]
        reply = answer(body, attempt, self.options.seed, self.options.faults)
        if reply.outcome == "rate_limited":
            error = _error("Rate limit reached for requests.", "requests", code="rate_limit_exceeded")
            status, content = 429, error
        elif reply.outcome == "server_error":
            status, content = 500, _error("The server had an error while processing your request.", "server_error")
        else:
            make = completion if "messages" in body else response_object
            status, content = 200, make(body, reply, request_id, int(time.time()))
            self.tokens.take(float(content["usage"]["total_tokens"]), False)
        self._write(entry, status=status, outcome=reply.outcome, body_sha256=key, attempt=attempt)
        return status, content

    def _let_in(self, authorization: str) -> None:
        expected = self.options.key_sha256
        given = hashlib.sha256(authorization.removeprefix("Bearer ").encode()).hexdigest()
        if expected and not hmac.compare_digest(given, expected):
            raise BadRequest("Incorrect API key provided.", status=401, code="invalid_api_key")

    def _write(self, entry: dict[str, Any], **facts: Any) -> None:
        if self.log:
            self.log.write(json.dumps({**entry, **facts, "answered": time.time()}) + "\n")


async def _read(request: Any, limit: int = BODY_BYTES) -> bytes:
    """The request body, refused as soon as it is too long."""
    body = bytearray()
    async for piece in request.stream():
        body += piece
        if len(body) > limit:
            raise BadRequest(f"The body is longer than {limit} bytes.", status=413)
    return bytes(body)


def _as_scripted(line: dict[str, Any], headers: dict[str, str]) -> Any:
    """The answer that a line of the script asks for."""
    from starlette.responses import JSONResponse, Response, StreamingResponse

    if line.get("drop"):

        async def broken() -> AsyncIterator[bytes]:
            yield b'{"choices": ['
            raise ConnectionResetError("as the script says")

        return StreamingResponse(broken(), 200, {**headers, "content-length": "1000"})
    headers = {**headers, **line.get("headers", {})}
    if "body" in line:
        return Response(line["body"], line["status"], headers)
    return JSONResponse(_error("As the script says.", "scripted", code=line.get("code")), line["status"], headers)


def _error(message: str, kind: str, param: str | None = None, code: str | None = None) -> dict[str, Any]:
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}
