"""The Batch API: shards of open requests as files, found again after a crash, their answers matched by custom_id."""

import asyncio
import json
import os
import time
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from jaxdistill.collect import batch_ledger
from jaxdistill.collect.api import Again, Api, Outcome, Reply, connected
from jaxdistill.collect.batch_api import BatchApi, Refused
from jaxdistill.collect.batch_ledger import Tracked
from jaxdistill.collect.booking import Booking
from jaxdistill.collect.commits import Commits
from jaxdistill.collect.request import Response
from jaxdistill.collect.teacher import Teacher

MOST_REQUESTS, MOST_BYTES = 50_000, 200_000_000  # of a batch, as OpenAI limits it
_ENDED = frozenset({"completed", "expired", "cancelled", "failed"})


class BatchSender:
    """Submits open requests in batches, unless it is only to fetch those of an earlier run, and books the answers."""

    def __init__(self, teacher: Teacher, commits: Commits, ended: Callable[[], bool], folder: Path):
        self.teacher, self.config, self.commits, self.ledger = teacher, teacher.config, commits, commits.ledger
        self._booking = Booking(teacher, commits)
        self._ended, self._folder = ended, folder
        self._submits = teacher.in_batches

    async def run(self) -> None:
        """Works until `ended`; batches that are out then are fetched by the next run.

        Raises:
          RunError: the provider does not answer.
          OSError: the disk is full.
        """
        async with connected(self.config) as api:
            batches = BatchApi(api)
            try:
                for batch in await self.commits(batch_ledger.unfinished, self.ledger):
                    if batch.batch_id is None:
                        await self._adopt(batches, batch)
                while not self._ended():
                    while self._submits and await self._submit_next(batches):
                        pass
                    for batch in await self.commits(batch_ledger.unfinished, self.ledger):
                        if batch.batch_id is not None:
                            await self._fetch(api, batches, batch, batch.batch_id)
                    deadline = time.monotonic() + self.config.poll_s
                    while not self._ended() and time.monotonic() < deadline:
                        await asyncio.sleep(min(0.1, self.config.poll_s))
            except Refused as error:
                await self.commits(self.ledger.stop, str(error))
                while not self._ended():  # what else is under way finishes first
                    await asyncio.sleep(0.1)

    async def _submit_next(self, batches: BatchApi) -> bool:
        """Submits one shard; false if nothing is open or fits."""
        token = uuid.uuid4().hex
        claimed = await self.commits(batch_ledger.plan, self.ledger, token, MOST_REQUESTS, MOST_BYTES)
        if claimed:
            await self._submit(batches, token)
        return bool(claimed)

    async def _submit(self, batches: BatchApi, token: str) -> None:
        """Uploads the file of a planned batch and creates the batch."""
        requests = await self.commits(batch_ledger.members, self.ledger, token)
        endpoint = batch_ledger.endpoint(next(iter(requests.values())).body)
        content = b"".join(batch_ledger.line(key, request.body) for key, request in requests.items())
        try:
            batch_id = await batches.create(token, await batches.upload(token, content), endpoint)
        except Refused as error:
            for key in requests:  # no batch was made: nothing is out
                self.commits(self.ledger.retry, key, str(error), 0.0, lost=False, tried=False)
            await self.commits(batch_ledger.finished, self.ledger, token)
            await self.commits(self.ledger.stop, f"the provider takes no batch: {error}")
        else:
            await self.commits(batch_ledger.submitted, self.ledger, token, batch_id)

    async def _adopt(self, batches: BatchApi, batch: Tracked) -> None:
        """A batch whose submission a crash cut off: found by its metadata, or submitted now."""
        if (batch_id := await batches.find(batch.token)) is None:
            await self._submit(batches, batch.token)
        else:
            await self.commits(batch_ledger.submitted, self.ledger, batch.token, batch_id)

    async def _fetch(self, api: Api, batches: BatchApi, batch: Tracked, batch_id: str) -> None:
        """Books what is in the files of a batch that has ended; what is in neither is asked for again."""
        state = await batches.show(batch_id)
        if state["status"] not in _ENDED:
            return
        left = await self.commits(batch_ledger.members, self.ledger, batch.token)
        for name in filter(None, (state.get("output_file_id"), state.get("error_file_id"))):
            content = await self._download(batches, str(name))
            for row in content.splitlines():
                values = _object(row)
                key = str(values.get("custom_id"))
                if (request := left.pop(key, None)) is not None:
                    await self._booking.book(key, request.tries, _outcome(api, row, values, batch.created))
        why = api.excerpt(json.dumps(state.get("errors")).encode()) if state.get("errors") else ""
        if state["status"] == "failed":
            await self.commits(self.ledger.stop, f"the provider refused the batch {batch_id}: {why}")
        for key, request in left.items():
            outcome = Again(detail=f"the batch is {state['status']} and has no answer {why}".strip())
            await self._booking.book(key, request.tries, outcome)
        await self.commits(batch_ledger.finished, self.ledger, batch.token)

    async def _download(self, batches: BatchApi, name: str) -> bytes:
        """A file of the provider, on the disk before anything reads it."""
        path = self._folder / f"{Path(name).name}.jsonl"
        if not path.exists():
            await asyncio.to_thread(_write, path, await batches.download(name))
        return path.read_bytes()


def _object(row: bytes) -> Mapping[str, Any]:
    """The object in a line; an empty one, which answers nothing, where it holds none."""
    try:
        values = json.loads(row)
    except (ValueError, RecursionError):
        return {}
    return values if isinstance(values, dict) else {}


def _outcome(api: Api, row: bytes, values: Mapping[str, Any], sent: float) -> Outcome:
    """What one line of a batch's files says."""
    response = values.get("response")
    if not isinstance(response, dict):
        return Again(detail=f"in the batch: {api.excerpt(json.dumps(values.get('error')).encode())}")
    if response.get("status_code") == 200:
        return Response(raw=row, request_id=str(response.get("request_id") or ""), sent=sent, received=time.time())
    body = json.dumps(response.get("body")).encode()
    status = response.get("status_code")
    return api.judge(Reply(status=status if isinstance(status, int) else 500, headers={}, body=body, sent=sent))


def _write(path: Path, content: bytes) -> None:
    path.parent.mkdir(exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    with partial.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)
