"""The Batch API: shards of open requests as files, found again after a crash, their answers matched by custom_id."""

import asyncio
import json
import os
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

from jaxdistill.collect import batch_ledger
from jaxdistill.collect.api import Again, Api, Outcome, Reply, Stop, connected
from jaxdistill.collect.batch_ledger import Tracked
from jaxdistill.collect.booking import Booking
from jaxdistill.collect.commits import Commits
from jaxdistill.collect.request import Failure, Response
from jaxdistill.collect.teacher import Teacher
from jaxdistill.errors import RunError

MOST_REQUESTS, MOST_BYTES = 50_000, 200_000_000  # of a batch, as OpenAI limits it
_METADATA = "jaxdistill"  # the key under which a batch carries our token
_ENDED = frozenset({"completed", "expired", "cancelled", "failed"})
_ENDPOINT = "/v1/chat/completions"
_TRIES = 20  # of one call about a batch, some minutes in all, until the run gives up


class BatchSender:
    """Submits open requests in batches, unless it is only to fetch those of an earlier run, and books the answers."""

    def __init__(self, teacher: Teacher, commits: Commits, ended: Callable[[], bool], folder: Path):
        self.teacher, self.config, self.commits, self.ledger = teacher, teacher.config, commits, commits.ledger
        self._booking = Booking(teacher, commits)
        self._ended, self._folder = ended, folder
        self._submits = teacher.transport == "batch"

    async def run(self) -> None:
        """Works until `ended`; batches that are out then are fetched by the next run.

        Raises:
          RunError: the provider does not answer.
          OSError: the disk is full.
        """
        async with connected(self.config) as api:
            for batch in await self.commits(batch_ledger.unfinished, self.ledger):
                if batch.batch_id is None:
                    await self._adopt(api, batch)
            while not self._ended():
                while self._submits and await self._submit_next(api):
                    pass
                for batch in await self.commits(batch_ledger.unfinished, self.ledger):
                    if batch.batch_id is not None:
                        await self._fetch(api, batch, batch.batch_id)
                deadline = time.monotonic() + self.config.poll_s
                while not self._ended() and time.monotonic() < deadline:
                    await asyncio.sleep(min(0.1, self.config.poll_s))

    async def _submit_next(self, api: Api) -> bool:
        """Submits one shard; false if nothing is open or fits."""
        token = uuid.uuid4().hex
        claimed = await self.commits(batch_ledger.plan, self.ledger, token, MOST_REQUESTS, MOST_BYTES)
        if claimed:
            await self._submit(api, token)
        return bool(claimed)

    async def _submit(self, api: Api, token: str) -> None:
        """Uploads the file of a planned batch and creates the batch."""
        requests = await self.commits(batch_ledger.members, self.ledger, token)
        content = b"".join(batch_ledger.line(key, _ENDPOINT, request.body) for key, request in requests.items())
        form = {"files": {"file": (f"{token}.jsonl", content, "application/jsonl")}, "data": {"purpose": "batch"}}
        uploaded = await self._call(api, "POST", "/files", None, **form)
        if isinstance(uploaded, Reply):
            body = {
                "input_file_id": json.loads(uploaded.body)["id"],
                "endpoint": _ENDPOINT,
                "completion_window": "24h",
                "metadata": {_METADATA: token},
            }
            created = await self._call(api, "POST", "/batches", body)
            if isinstance(created, Reply):
                await self.commits(batch_ledger.submitted, self.ledger, token, json.loads(created.body)["id"])
                return
            uploaded = created
        reason = uploaded.reason if isinstance(uploaded, Stop) else uploaded.detail
        for key in requests:  # no batch was made: nothing is out
            self.commits(self.ledger.retry, key, reason, 0.0, lost=False, tried=False)
        await self.commits(batch_ledger.finished, self.ledger, token)
        await self.commits(self.ledger.stop, f"the provider takes no batch: {reason}")

    async def _adopt(self, api: Api, batch: Tracked) -> None:
        """A batch whose submission a crash cut off: found by its metadata, or submitted now."""
        after = ""
        while True:
            page = await self._call(api, "GET", f"/batches?limit=100{after}", None)
            if not isinstance(page, Reply):
                reason = page.reason if isinstance(page, Stop) else page.detail
                await self.commits(self.ledger.stop, reason)
                return
            listing = json.loads(page.body)
            for found in listing["data"]:
                if (found.get("metadata") or {}).get(_METADATA) == batch.token:
                    await self.commits(batch_ledger.submitted, self.ledger, batch.token, found["id"])
                    return
            if not listing.get("has_more"):
                break
            after = f"&after={listing['data'][-1]['id']}"
        await self._submit(api, batch.token)

    async def _fetch(self, api: Api, batch: Tracked, batch_id: str) -> None:
        """Books what is in the files of a batch that has ended; what is in neither is asked for again."""
        reply = await self._call(api, "GET", f"/batches/{batch_id}", None)
        if not isinstance(reply, Reply):
            await self.commits(self.ledger.stop, reply.reason if isinstance(reply, Stop) else reply.detail)
            return
        state = json.loads(reply.body)
        if state["status"] not in _ENDED:
            return
        left = await self.commits(batch_ledger.members, self.ledger, batch.token)
        for name in filter(None, (state.get("output_file_id"), state.get("error_file_id"))):
            content = await self._download(api, name)
            if content is None:
                return
            for row in content.splitlines():
                key = str(json.loads(row).get("custom_id"))
                if (request := left.pop(key, None)) is not None:
                    await self._booking.book(key, request.tries, _outcome(api, row, batch.created))
        why = api.excerpt(json.dumps(state.get("errors")).encode()) if state.get("errors") else ""
        if state["status"] == "failed":
            await self.commits(self.ledger.stop, f"the provider refused the batch {batch_id}: {why}")
        for key, request in left.items():
            outcome = Again(detail=f"the batch is {state['status']} and has no answer {why}".strip())
            await self._booking.book(key, request.tries, outcome)
        await self.commits(batch_ledger.finished, self.ledger, batch.token)

    async def _download(self, api: Api, name: str) -> bytes | None:
        """A file of the provider, on the disk before anything reads it; None if it is not to be had now."""
        path = self._folder / f"{Path(name).name}.jsonl"
        if not path.exists():
            reply = await self._call(api, "GET", f"/files/{name}/content", None)
            if not isinstance(reply, Reply):
                return None
            await asyncio.to_thread(_write, path, reply.body)
        return path.read_bytes()

    async def _call(self, api: Api, method: str, path: str, body: Any, **form: Any) -> Reply | Failure | Stop:
        """A call that goes through, however often it must be tried.

        Raises:
          RunError: it never did.
        """
        detail = ""
        for attempt in range(_TRIES):
            reply = await api.call(method, path, body, **form)
            if isinstance(reply, Reply) and reply.status == 200:
                return reply
            judged = reply if isinstance(reply, Again) else api.judge(reply)
            if not isinstance(judged, Again):
                return judged
            detail = judged.detail
            await asyncio.sleep(judged.wait_s or min(self.config.backoff_s * 2**attempt, 30.0))
        raise RunError(f"{method} {path} failed {_TRIES} times ({detail}); run the same command again")


def _outcome(api: Api, row: bytes, sent: float) -> Outcome:
    """What one line of a batch's files says."""
    values = json.loads(row)
    response = values.get("response")
    if not isinstance(response, dict):
        return Again(detail=f"in the batch: {api.excerpt(json.dumps(values.get('error')).encode())}")
    if response.get("status_code") == 200:
        return Response(raw=row, request_id=str(response.get("request_id") or ""), sent=sent, received=time.time())
    body = json.dumps(response.get("body")).encode()
    return api.judge(Reply(status=int(response.get("status_code") or 500), headers={}, body=body, sent=sent))


def _write(path: Path, content: bytes) -> None:
    path.parent.mkdir(exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    with partial.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)
