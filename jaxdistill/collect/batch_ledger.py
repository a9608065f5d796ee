"""The ledger's part about batches: which requests are in which, written down before anything is uploaded."""

import json
import time
from collections.abc import Mapping
from typing import Any, NamedTuple

from jaxdistill.collect.ledger import Claimed, Ledger


class Tracked(NamedTuple):
    """A batch that is not finished."""

    token: str  # ours, in the batch's metadata
    created: float  # seconds since the epoch
    batch_id: str | None  # None: it may or may not have been submitted


def plan(ledger: Ledger, token: str, requests: int, file_bytes: int) -> list[Claimed]:
    """Puts open requests into a new batch, as many as the budget, their number and the size of the file allow."""
    with ledger.transaction():
        claimed = ledger.claim(requests, time.time())
        size, taken = 0, 0
        for request in claimed:
            size += len(line(request.key, request.body))
            if taken and (size > file_bytes or endpoint(request.body) != endpoint(claimed[0].body)):
                break
            taken += 1
        for request in claimed[taken:]:
            ledger.retry(request.key, "", 0.0, lost=False, tried=False)
        if taken:
            ledger.database.execute("INSERT INTO batches (token, created) VALUES (?, ?)", (token, time.time()))
            rows = [(token, request.key) for request in claimed[:taken]]
            ledger.database.executemany("UPDATE requests SET remote = ? WHERE key = ?", rows)
        return claimed[:taken]


def endpoint(body: Mapping[str, Any]) -> str:
    """What answers such a request; all of a batch have one."""
    return "/v1/chat/completions" if "messages" in body else "/v1/responses"


def line(key: str, body: Mapping[str, Any]) -> bytes:
    """One request in a batch's input file."""
    row = {"custom_id": key, "method": "POST", "url": endpoint(body), "body": dict(body)}
    return json.dumps(row).encode() + b"\n"


def submitted(ledger: Ledger, token: str, batch_id: str) -> None:
    """The provider has a batch."""
    with ledger.transaction():
        ledger.database.execute(
            "UPDATE batches SET state = 'submitted', batch_id = ? WHERE token = ?", (batch_id, token)
        )


def finished(ledger: Ledger, token: str) -> None:
    """Everything in a batch is booked."""
    with ledger.transaction():
        ledger.database.execute("UPDATE batches SET state = 'finished' WHERE token = ?", (token,))


def unfinished(ledger: Ledger) -> list[Tracked]:
    """Batches whose answers are still to be fetched, of this run or an earlier one."""
    rows = ledger.database.execute("SELECT token, created, batch_id FROM batches WHERE state != 'finished'")
    return [Tracked(*row) for row in rows.fetchall()]


def members(ledger: Ledger, token: str) -> dict[str, Claimed]:
    """Requests of a batch that have no outcome yet, by key."""
    rows = ledger.database.execute(
        "SELECT key, body, tries FROM requests WHERE remote = ? AND state = 'sent'", (token,)
    ).fetchall()
    return {key: Claimed(key, json.loads(body), tries, token) for key, body, tries in rows}
