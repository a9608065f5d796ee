"""Every request and every raw answer of a run folder in one SQLite file, so that nothing is lost or paid for twice."""

import contextlib
import dataclasses
import fcntl
import hashlib
import json
import sqlite3
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

from jaxdistill.errors import UserError, disk_full
from jaxdistill.records import Message

_SCHEMA = """
CREATE TABLE IF NOT EXISTS requests (
  key TEXT PRIMARY KEY,           -- Request.key
  body TEXT NOT NULL,             -- JSON as sent: model, messages, parameters
  sample_index INTEGER NOT NULL,
  recorded REAL NOT NULL,         -- seconds since the epoch, before sending
  state TEXT NOT NULL DEFAULT 'pending' CHECK (state IN ('pending', 'done', 'refused')),
  attempts INTEGER NOT NULL DEFAULT 0,
  failure TEXT                    -- why the last try failed; sent again on restart unless refused
);
CREATE TABLE IF NOT EXISTS responses (
  key TEXT PRIMARY KEY REFERENCES requests (key),
  request_id TEXT NOT NULL,
  received REAL NOT NULL,         -- seconds since the epoch
  raw BLOB NOT NULL               -- bytes of the body, as received
);
"""


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Request:
    """One call, addressed by its content."""

    model: str
    messages: tuple[Message, ...]
    parameters: Mapping[str, Any]
    sample_index: int

    @property
    def body(self) -> dict[str, Any]:
        """What is sent."""
        return {"model": self.model, "messages": [dict(m) for m in self.messages], **self.parameters}

    @property
    def prompt_hash(self) -> str:
        """SHA-256 of model, messages and parameters: the same for all samples of one prompt."""
        return _digest([self.model, [dict(m) for m in self.messages], dict(self.parameters)])

    @property
    def key(self) -> str:
        """SHA-256 of all that makes the request; its name in the ledger."""
        return _digest([self.prompt_hash, self.sample_index])


@dataclasses.dataclass(frozen=True, kw_only=True)
class Response:
    """The body of an answer, before anything reads it."""

    raw: bytes
    request_id: str
    received: float  # seconds since the epoch
    attempts: int = 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class Failure:
    """Why there is no answer."""

    detail: str
    permanent: bool  # the server refused this request, or it cannot be sent; asking again would change nothing
    attempts: int = 1


class Ledger:
    """The ledger of one run folder, held by one process at a time.

    A response is on the disk when `finish` returns: the write-ahead log is synchronized at each commit.

    Raises:
      UserError: another process holds it, or the file is not a ledger.
    """

    def __init__(self, path: Path):
        self._path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        self._lock = path.with_name(path.name + ".lock").open("w")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._lock.close()
            raise UserError(f"{path} is in use by another process; wait for it or choose another workdir") from None
        self._database = sqlite3.connect(path, isolation_level=None)
        try:
            self._database.execute("PRAGMA journal_mode = WAL")
            self._database.execute("PRAGMA synchronous = FULL")
            self._database.executescript(_SCHEMA)
        except sqlite3.DatabaseError as error:
            self.close()
            _raise_if_full(error, path)
            raise UserError(f"{path} is not a usable ledger ({error}); move it away to start afresh") from None

    def __enter__(self) -> "Ledger":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Closes the file and lets others have it."""
        self._database.close()
        self._lock.close()

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[None]:
        try:
            self._database.execute("BEGIN IMMEDIATE")
            yield
            self._database.execute("COMMIT")
        except BaseException as error:
            if self._database.in_transaction:  # a full disk has rolled back already
                self._database.execute("ROLLBACK")
            _raise_if_full(error, self._path)
            raise

    def record(self, requests: Iterable[Request]) -> None:
        """Writes requests down before any is sent; those already known stay as they are.

        In ASCII: SQLite refuses half a surrogate pair.
        """
        now = time.time()
        with self._transaction():
            self._database.executemany(
                "INSERT OR IGNORE INTO requests (key, body, sample_index, recorded) VALUES (?, ?, ?, ?)",
                ((r.key, json.dumps(r.body), r.sample_index, now) for r in requests),
            )

    def pending(self) -> set[str]:
        """Keys of the recorded requests that have neither an answer nor a refusal."""
        return {key for (key,) in self._database.execute("SELECT key FROM requests WHERE state = 'pending'")}

    def finish(self, key: str, response: Response) -> None:
        """Commits the raw bytes of an answer."""
        with self._transaction():
            self._database.execute(
                "INSERT INTO responses (key, request_id, received, raw) VALUES (?, ?, ?, ?)",
                (key, response.request_id, response.received, response.raw),
            )
            self._set_state(key, "done", response.attempts, None)

    def fail(self, key: str, failure: Failure) -> None:
        """Notes why there is no answer; unless that is permanent the request stays pending."""
        with self._transaction():
            self._set_state(key, "refused" if failure.permanent else "pending", failure.attempts, failure.detail)

    def _set_state(
        self, key: str, state: Literal["pending", "done", "refused"], attempts: int, why: str | None
    ) -> None:
        self._database.execute(
            "UPDATE requests SET state = ?, attempts = attempts + ?, failure = ? WHERE key = ?",
            (state, attempts, why, key),
        )

    def result(self, key: str) -> Response | Failure:
        """The answer to a recorded request, or why there is none."""
        row = self._database.execute(
            "SELECT state, attempts, failure, request_id, received, raw "
            "FROM requests LEFT JOIN responses USING (key) WHERE key = ?",
            (key,),
        ).fetchone()
        if row is None:
            raise KeyError(f"request {key} was never recorded")
        state, attempts, failure, request_id, received, raw = row
        if state == "done":
            return Response(raw=raw, request_id=request_id, received=received, attempts=attempts)
        return Failure(detail=failure or "not answered yet", permanent=state == "refused", attempts=attempts)


def _raise_if_full(error: BaseException, path: Path) -> None:
    """SQLite's word for a full disk, said as the operating system says it."""
    if getattr(error, "sqlite_errorcode", None) == sqlite3.SQLITE_FULL:
        raise disk_full(path) from error
