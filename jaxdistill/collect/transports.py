"""One attempt at one request: chat completions, Responses, and Responses in the background, polled by id."""

import asyncio
import json
import time
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from jaxdistill.collect.api import Again, Api, Outcome, Reply, may_pass
from jaxdistill.collect.reply import NoCompletion, parse
from jaxdistill.collect.request import Failure, Response

_MISSED_POLLS = 20  # polls in a row that may fail before the answer counts as lost for this attempt
_RETRIED_CODES = frozenset({"server_error", "rate_limit_exceeded"})

Told = Callable[[Mapping[str, str]], None]  # takes the headers of each response


async def chat(api: Api, body: Mapping[str, Any], told: Told) -> Outcome:
    """POST /chat/completions."""
    return await _post(api, "/chat/completions", dict(body), told)


async def responses(api: Api, body: Mapping[str, Any], told: Told) -> Outcome:
    """POST /responses, waiting for the answer."""
    return await _post(api, "/responses", dict(body), told)


async def _post(api: Api, path: str, body: Mapping[str, Any], told: Told) -> Outcome:
    reply = await api.call("POST", path, body)
    if isinstance(reply, Again):
        return reply
    told(reply.headers)
    return accept(api, reply) if reply.status == 200 else api.judge(reply)


def accept(api: Api, reply: Reply) -> Outcome:
    """An HTTP 200; a proxy's page, or an error that calls itself a success, is no answer: try again.

    Whatever else came was paid for and is kept, even if nothing here can read it. Looking is not reading: the bytes are
    committed as they came.
    """
    try:
        body = parse(reply.body)
    except NoCompletion as error:
        return Again(detail=f"HTTP 200, but {error}: {api.excerpt(reply.body)}", lost=True)
    if body.get("status") in ("failed", "cancelled"):
        return _failed(api, body)
    request_id = reply.headers.get("x-request-id") or str(body.get("id") or "")
    return Response(raw=reply.body, request_id=request_id, sent=reply.sent, received=time.time())


def _failed(api: Api, body: Mapping[str, Any]) -> Again | Failure:
    """An answer that the Responses API gave up on."""
    error = body.get("error")
    code = error.get("code") if isinstance(error, dict) else None
    detail = f"status {body['status']}: {api.excerpt(json.dumps(error).encode())}"
    if code in _RETRIED_CODES or body["status"] == "cancelled":
        return Again(detail=detail, busy=code == "rate_limit_exceeded", lost=True)
    return Failure(detail=detail, permanent=True)


async def background(
    api: Api,
    body: Mapping[str, Any],
    told: Told,
    remote: str | None,
    accepted: Callable[[str], Awaitable[None]],
    poll_s: float,
) -> Outcome:
    """Posts a request unless the server has it already, remembers its id, and asks until the answer is whole.

    The server works on while nobody is connected: a lost poll costs nothing.
    """
    sent = time.time()
    if remote is None:
        reply = await api.call("POST", "/responses", {**body, "background": True, "store": True})
        if isinstance(reply, Again):
            return reply
        told(reply.headers)
        if reply.status != 200:
            return api.judge(reply)
        try:
            remote = str(json.loads(reply.body)["id"])
        except (ValueError, LookupError, TypeError) as error:
            return Again(detail=f"HTTP 200 without an id ({error}): {api.excerpt(reply.body)}", lost=True)
        await accepted(remote)
    missed = 0
    while missed < _MISSED_POLLS:
        await asyncio.sleep(poll_s)
        reply = await api.call("GET", f"/responses/{remote}")
        if isinstance(reply, Again) or may_pass(reply.status):
            missed += 1
            continue
        if reply.status == 404:
            return Again(detail=f"the server has forgotten the answer {remote}", lost=True)
        if reply.status != 200:
            return api.judge(reply)
        status = _status(reply.body)
        if status in ("queued", "in_progress"):
            missed = 0
        elif status is None and _is_no_answer(reply.body):  # a proxy's page, say: the server works on
            missed += 1
        else:
            return accept(api, Reply(status=200, headers=reply.headers, body=reply.body, sent=sent))
    return Again(detail=f"{missed} polls of {remote} in a row had no answer", lost=True)


def _status(body: bytes) -> Any:
    try:
        return json.loads(body)["status"]
    except (ValueError, LookupError, TypeError, RecursionError):
        return None


def _is_no_answer(body: bytes) -> bool:
    try:
        parse(body)
    except NoCompletion:
        return True
    return False
