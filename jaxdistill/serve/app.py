"""The routes: from a request over HTTP to samples of the engine and back, whole or as a stream."""

import asyncio
import dataclasses
import json
import os
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from jaxdistill.data import chat
from jaxdistill.errors import UserError
from jaxdistill.sample import request as sampler
from jaxdistill.sample.text import TextStream
from jaxdistill.serve import openapi
from jaxdistill.serve.answers import ChatReply, Choice, CompletionReply, Reply, Said, Usage
from jaxdistill.serve.gate import Gate, Limits
from jaxdistill.serve.metrics import Metrics
from jaxdistill.serve.schema import COMPLETION_TOKENS, ApiError, Body, ChatBody, CompletionBody, Sampled, parse
from jaxdistill.serve.worker import Worker


@dataclasses.dataclass(frozen=True)
class _Job:
    """One call, ready to be sampled."""

    reply: Reply
    choices: dict[str, Choice]  # by id of the sampler's request
    requests: list[sampler.Request]
    usage: Usage
    started: float


class Server:
    """An OpenAI-compatible server for one model.

    Args:
      name: what clients call the model.
      fingerprint: of its weights.
      key: the only one that is let in; empty lets everybody in.
    """

    def __init__(self, worker: Worker, tokenizer: Any, name: str, fingerprint: str, limits: Limits, key: str = ""):
        self.worker, self.limits, self.name = worker, limits, name
        self._tokenizer, self._fingerprint = tokenizer, fingerprint
        self._started = int(time.time())
        self._openapi = openapi.document(name, bool(key))
        self._tokenizing = asyncio.Lock()  # a long prompt takes a while: beside the event loop, but one at a time
        self.metrics = Metrics(worker)
        routes = [
            Route("/v1/chat/completions", self._chat, methods=["POST"]),
            Route("/v1/completions", self._completions, methods=["POST"]),
            Route("/v1/models", self._models),
            Route("/v1/models/{name:path}", self._model),
            Route("/metrics", self._metrics),
            Route("/health", self._health),
            Route("/openapi.json", self._document),
        ]
        handlers = {ApiError: _api_error, HTTPException: _http_error, Exception: _failure}
        app = Starlette(routes=routes, exception_handlers=handlers, lifespan=self._lifespan)
        self.app = Gate(app, frozenset(route.path for route in routes), limits, key, self.metrics)

    @asynccontextmanager
    async def _lifespan(self, _: Starlette) -> AsyncIterator[None]:
        self.worker.start()
        yield
        await self.worker.close()

    # --- routes ------------------------------------------------------------------------------------------------------

    async def _chat(self, request: Request) -> Response:
        return await self._answer(request, ChatBody)

    async def _completions(self, request: Request) -> Response:
        return await self._answer(request, CompletionBody)

    async def _models(self, _: Request) -> Response:
        return JSONResponse({"object": "list", "data": [self._about()]})

    async def _model(self, request: Request) -> Response:
        self._check_name(request.path_params["name"])
        return JSONResponse(self._about())

    async def _metrics(self, _: Request) -> Response:
        return Response(self.metrics.text(), media_type="text/plain; version=0.0.4")

    async def _health(self, _: Request) -> Response:
        failed = self.worker.error is not None
        return JSONResponse({"status": "the engine failed" if failed else "ok"}, 503 if failed else 200)

    async def _document(self, _: Request) -> Response:
        return JSONResponse(self._openapi)

    def _about(self) -> dict[str, Any]:
        about = {"id": self.name, "object": "model", "created": self._started, "owned_by": "jaxdistill"}
        return {**about, "max_model_len": self.worker.engine.positions}  # vLLM's name for it

    def _check_name(self, name: str) -> None:
        if name != self.name:
            message = f"There is no model {name[:200]!r} here; expected {self.name!r}."
            raise ApiError(404, message, "model", "model_not_found")

    # --- from a body to samples --------------------------------------------------------------------------------------

    async def _answer(self, request: Request, kind: type[Body]) -> Response:
        started = time.monotonic()
        if self.worker.error:
            raise ApiError(503, "The engine failed; the server ends.")
        try:
            raw = await self._read(request)
        except ClientDisconnect:
            self.metrics.left.inc()
            return Response(status_code=400)  # nobody reads it
        body = parse(kind, raw)
        self._check_name(body.model)
        prompts = len(body.prompts) if isinstance(body, CompletionBody) else 1
        self._check_room(prompts * (body.n or 1))  # before the work of tokenizing, and again after it
        try:
            async with self._tokenizing:
                job = await asyncio.to_thread(self._job, body, started)
        except UserError as error:
            raise ApiError(400, str(error)) from None
        self._check_room(len(job.requests))
        self.metrics.prompt_tokens.inc(job.usage.prompt)
        events = self.worker.submit(job.requests)
        if body.stream:
            return _Stream(self._stream(job, events, body.tells_usage), lambda: self._leave(job))
        try:
            answer = await _unless_left(request, self._whole(job, events))
        finally:
            self._leave(job)
        return Response(status_code=400) if answer is None else JSONResponse(answer)

    def _leave(self, job: _Job) -> None:
        if self.worker.leave(job.choices):
            self.metrics.left.inc()

    async def _read(self, request: Request) -> bytes:
        """The body, refused as soon as it is too long or takes too long."""
        if request.headers.get("content-type", "").split(";")[0].strip().lower() != "application/json":
            # Also what keeps web pages from reaching a server on loopback through their reader's browser
            raise ApiError(415, "The content-type is not application/json.")
        body, most = bytearray(), self.limits.body_bytes
        try:
            async with asyncio.timeout(self.limits.body_s):
                async for piece in request.stream():
                    body += piece
                    if len(body) > most:
                        raise ApiError(413, f"The body is longer than {most} bytes.")
        except TimeoutError:
            raise ApiError(408, f"The body was not there after {self.limits.body_s:g} seconds.") from None
        return bytes(body)

    def _check_room(self, samples: int) -> None:
        if samples > self.worker.room:
            raise ApiError(400, f"The call asks for {samples} samples; this server takes {self.worker.room} at once.")
        if self.worker.unfinished + samples > self.worker.room:
            raise ApiError(429, "Too many samples are waiting; try again later.", code="rate_limit_exceeded")

    def _job(self, body: ChatBody | CompletionBody, started: float) -> _Job:
        """Tokenizes and checks."""
        if isinstance(body, ChatBody):
            messages = [message.message() for message in body.messages]
            prompts = [chat.prompt_tokens(self._tokenizer, messages)]
            top, echo = ((body.top_logprobs or 0) if body.logprobs else None), False
            if body.top_logprobs and not body.logprobs:
                raise ApiError(400, "top_logprobs is set without logprobs; set logprobs to true.", "top_logprobs")
            limit = body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens
            reply: Reply = ChatReply(self.name, self._fingerprint, self._tokenizer, top)
        else:
            prompts = [p if isinstance(p, list) else self._tokenizer(p)["input_ids"] for p in body.prompts]
            top, echo = body.logprobs, bool(body.echo)
            limit = COMPLETION_TOKENS if body.max_tokens is None else body.max_tokens
            reply = CompletionReply(self.name, self._fingerprint, self._tokenizer, top)
        requests, choices = [], {}
        n = body.n or 1
        for which, prompt in enumerate(prompts):
            most = self._most_tokens(prompt, limit)
            settings = body.sampling(most)
            for sample in range(n):
                request = sampler.Request(
                    id=f"{reply.id}-{which}-{sample}",
                    prompt=tuple(prompt),
                    sampling=settings,
                    seed=_seed(body, which, sample),
                    logprobs=top is not None,
                    prompt_logprobs=top is not None and echo,
                )
                self.worker.engine.check(request)
                text = body.prompts[which] if isinstance(body, CompletionBody) else ""
                told = (prompt, text if isinstance(text, str) else self._tokenizer.decode(text)) if echo else None
                stream = TextStream(self._tokenizer, body.stops)
                choices[request.id] = Choice(which * n + sample, stream, most, told, top is not None)
                requests.append(request)
        return _Job(reply, choices, requests, Usage(sum(map(len, prompts))), started)

    def _most_tokens(self, prompt: list[int], limit: int | None) -> int:
        """Output tokens at most."""
        positions = self.worker.engine.positions
        if not prompt:
            raise ApiError(400, "The prompt has no tokens; expected one at least.")
        left = positions - len(prompt)
        if left < max(1, limit or 0):
            asked = f" and {limit} more were asked for" if limit else ""
            raise ApiError(
                400,
                f"The prompt has {len(prompt)} tokens{asked}; this server has {positions} positions for both.",
                code="context_length_exceeded",
            )
        return left if limit is None else limit

    # --- from events to answers --------------------------------------------------------------------------------------

    async def _parts(self, job: _Job, events: "asyncio.Queue[Any]") -> AsyncIterator[Said]:
        """Parts of all choices as they come, until every one is finished."""
        unfinished = set(job.choices)
        while unfinished:
            event = await events.get()
            if event is None:
                raise ApiError(500, "The engine failed; the server ends.")
            if event.id not in unfinished:
                continue  # after a stop string
            choice = job.choices[event.id]
            if not job.usage.output:
                self.metrics.first_token_s.observe(time.monotonic() - job.started)
            before = choice.tokens
            said = choice.take(event)
            job.usage.output += choice.tokens - before
            self.metrics.output_tokens.inc(choice.tokens - before)
            if said.finish_reason:
                unfinished.remove(event.id)
                self.worker.leave([event.id])
            yield said
        self.metrics.answer_s.observe(time.monotonic() - job.started)

    async def _whole(self, job: _Job, events: "asyncio.Queue[Any]") -> dict[str, Any]:
        said: list[list[Said]] = [[] for _ in job.choices]
        async for part in self._parts(job, events):
            said[part.index].append(part)
        return job.reply.answer(said, job.usage)

    async def _stream(self, job: _Job, events: "asyncio.Queue[Any]", tells_usage: bool) -> AsyncIterator[str]:
        begun = set()
        try:
            async for part in self._parts(job, events):
                yield _sse(job.reply.part(part, part.index not in begun))
                begun.add(part.index)
        except ApiError as error:
            yield _sse(error.body)
            return
        if tells_usage:
            yield _sse(job.reply.usage(job.usage))
        yield "data: [DONE]\n\n"


class _Stream(StreamingResponse):
    """Server-sent events; `done` is called when they end, or when the client leaves."""

    def __init__(self, events: AsyncIterator[str], done: Callable[[], None]):
        super().__init__(events, media_type="text/event-stream", headers={"cache-control": "no-store"})
        self._done = done

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._done()


def _sse(content: dict[str, Any]) -> str:
    return f"data: {json.dumps(content, ensure_ascii=False, separators=(',', ':'))}\n\n"


def _seed(body: Sampled, prompt: int, sample: int) -> int:
    """A seed of each sample's own, 31 bits: a function of the client's, or by chance."""
    if body.seed is None:
        return int.from_bytes(os.urandom(4), "big") >> 1
    return sampler.derived_seed(body.seed, prompt, sample)


async def _unless_left(request: Request, work: Awaitable[dict[str, Any]]) -> dict[str, Any] | None:
    """The result, or None if the client left before."""

    async def left() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    tasks = [asyncio.ensure_future(work), asyncio.ensure_future(left())]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        return tasks[0].result() if tasks[0].done() else None
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _api_error(_: Request, error: Any) -> Response:
    headers = {"retry-after": "1"} if error.status == 429 else None
    return JSONResponse(error.body, error.status, headers)


async def _http_error(request: Request, error: Any) -> Response:
    words = f"{request.method} {request.url.path[:200]!r}: {error.detail}"
    return JSONResponse(ApiError(error.status_code, words).body, error.status_code, error.headers)


async def _failure(_: Request, error: Exception) -> Response:
    return JSONResponse(ApiError(500, "The server failed; its log says more.").body, 500)  # starlette logs the error
