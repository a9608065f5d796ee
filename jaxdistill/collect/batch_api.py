"""Calls about files and batches, tried until they go through: a provider's page of HTML is not taken for an answer."""

import asyncio
import json
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from jaxdistill.collect.api import Again, Api, Reply, Stop
from jaxdistill.errors import RunError

_METADATA = "jaxdistill"  # the key under which a batch carries our token
_TRIES = 20  # of one call, some minutes in all, until the run gives up

T = TypeVar("T")


class Refused(Exception):  # noqa: N818
    """The provider will not do it, however often it is asked."""


class BatchApi:
    """Files and batches of one provider.

    Every method raises `Refused`, or RunError where no answer came in many attempts.
    """

    def __init__(self, api: Api):
        self._api = api

    async def upload(self, token: str, lines: bytes) -> str:
        """Uploads the input file of a batch; returns its id."""
        form = {"files": {"file": (f"{token}.jsonl", lines, "application/jsonl")}, "data": {"purpose": "batch"}}
        return await self._call("POST", "/files", lambda body: str(_object(body)["id"]), **form)

    async def create(self, token: str, file_id: str, endpoint: str) -> str:
        """Creates a batch; returns its id. An attempt that no answer came to may have made it: it is looked for."""
        metadata = {_METADATA: token}
        body = {"input_file_id": file_id, "endpoint": endpoint, "completion_window": "24h", "metadata": metadata}
        detail = ""
        for attempt in range(_TRIES):
            if attempt and (found := await self.find(token)) is not None:
                return found
            made = await self._try("POST", "/batches", lambda body: str(_object(body)["id"]), body=body)
            if not isinstance(made, Again):
                return made
            detail = made.detail
            await self._pause(made, attempt)
        raise RunError(f"no batch could be made in {_TRIES} attempts ({detail}); run the same command again")

    async def find(self, token: str) -> str | None:
        """The id of the batch with our token in its metadata; None if there is none."""
        after = ""
        while True:
            page = await self._call("GET", f"/batches?limit=100{after}", _page)
            for batch in page["data"]:
                if (batch.get("metadata") or {}).get(_METADATA) == token:
                    return str(batch["id"])
            if not page.get("has_more"):
                return None
            after = f"&after={page['data'][-1]['id']}"

    async def show(self, batch_id: str) -> Mapping[str, Any]:
        """A batch: its `status` and files."""
        return await self._call("GET", f"/batches/{batch_id}", _state)

    async def download(self, file_id: str) -> bytes:
        """The lines of a batch's output or errors."""
        return await self._call("GET", f"/files/{file_id}/content", _lines)

    async def _call(self, method: str, path: str, read: Callable[[bytes], T], **options: Any) -> T:
        detail = ""
        for attempt in range(_TRIES):
            found = await self._try(method, path, read, **options)
            if not isinstance(found, Again):
                return found
            detail = found.detail
            await self._pause(found, attempt)
        raise RunError(f"{method} {path} failed {_TRIES} times ({detail}); run the same command again")

    async def _try(self, method: str, path: str, read: Callable[[bytes], T], **options: Any) -> T | Again:
        reply = await self._api.call(method, path, **options)
        if isinstance(reply, Again):
            return reply
        if reply.status == 200:
            return self._read(reply, read)
        judged = self._api.judge(reply)
        if isinstance(judged, Again):
            return judged
        raise Refused(judged.reason if isinstance(judged, Stop) else judged.detail)

    def _read(self, reply: Reply, read: Callable[[bytes], T]) -> T | Again:
        try:
            return read(reply.body)
        except (ValueError, LookupError, TypeError, RecursionError) as error:
            why = f"{type(error).__name__}: {error}"
            return Again(detail=f"HTTP 200, but not what was asked for ({why}): {self._api.excerpt(reply.body)}")

    async def _pause(self, again: Again, attempt: int) -> None:
        await asyncio.sleep(again.wait_s or min(self._api.config.backoff_s * 2**attempt, 30.0))


def _object(body: bytes) -> dict[str, Any]:
    values = json.loads(body)
    if not isinstance(values, dict):
        raise TypeError(f"a JSON {type(values).__name__}")
    return values


def _page(body: bytes) -> dict[str, Any]:
    page = _object(body)
    if not all("id" in batch for batch in page["data"]):
        raise TypeError("a batch without an id")
    return page


def _state(body: bytes) -> dict[str, Any]:
    batch = _object(body)
    if "status" not in batch:
        raise TypeError("a batch without a status")
    return batch


def _lines(body: bytes) -> bytes:
    """Unless its first line is that of a batch; the others are judged one by one."""
    first = next(filter(bytes.strip, body.splitlines()), b"")
    if first and "custom_id" not in _object(first):
        raise TypeError("a line without a custom_id")
    return body
