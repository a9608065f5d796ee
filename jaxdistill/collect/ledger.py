"""Every request, raw answer and dollar of a run folder in one SQLite file: nothing is lost or paid for twice."""

import contextlib
import dataclasses
import fcntl
import json
import sqlite3
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

from jaxdistill.collect.request import Failure, Request, Response
from jaxdistill.errors import RunError, UserError, disk_full

VERSION = 2  # of the schema
_SCHEMA = """
CREATE TABLE requests (
  id INTEGER PRIMARY KEY,         -- in the order of planning
  key TEXT UNIQUE NOT NULL,       -- Request.key
  body TEXT NOT NULL,             -- JSON as sent: model, messages, parameters
  sample_index INTEGER NOT NULL,
  prompt TEXT NOT NULL,           -- Request.prompt
  recorded REAL NOT NULL,         -- seconds since the epoch, before sending
  -- idle: not part of the run that goes on now. open: to be sent. sent: a process is at it. answered: not read yet.
  -- failed: given up for this run. refused: given up for good.
  state TEXT NOT NULL CHECK (state IN ('idle', 'open', 'sent', 'answered', 'done', 'failed', 'refused')),
  due REAL NOT NULL DEFAULT 0,    -- when an open one is to be tried again; 0 for one that was not tried in this run
  attempts INTEGER NOT NULL DEFAULT 0,  -- over all runs
  tries INTEGER NOT NULL DEFAULT 0,     -- of them in this run
  failure TEXT,                   -- why the last attempt failed
  worst_nano INTEGER NOT NULL,    -- most that one attempt can cost, in billionths of a dollar
  worst_tokens INTEGER NOT NULL,  -- most tokens that one attempt can use
  remote TEXT                     -- id of the answer that a server is working on, or the token of the batch it is in
);
CREATE INDEX requests_open ON requests (due, id) WHERE state = 'open';
CREATE INDEX requests_sent ON requests (state) WHERE state IN ('sent', 'answered');
CREATE TABLE responses (
  key TEXT PRIMARY KEY REFERENCES requests (key),
  request_id TEXT NOT NULL,
  sent REAL NOT NULL,             -- seconds since the epoch
  received REAL NOT NULL,
  nano INTEGER,                   -- cost in billionths of a dollar; NULL until the answer was read
  tokens INTEGER,
  raw BLOB NOT NULL               -- bytes of the body, as received
);
CREATE TABLE account (            -- one row
  spent_nano INTEGER NOT NULL DEFAULT 0, spent_tokens INTEGER NOT NULL DEFAULT 0,        -- by usage
  reserved_nano INTEGER NOT NULL DEFAULT 0, reserved_tokens INTEGER NOT NULL DEFAULT 0,  -- worst case of what is out
  lost_nano INTEGER NOT NULL DEFAULT 0, lost_tokens INTEGER NOT NULL DEFAULT 0,  -- worst case of what never came
  budget_nano INTEGER, budget_tokens INTEGER,
  stop TEXT                       -- why no process is to send anything more
);
INSERT INTO account DEFAULT VALUES;
CREATE TABLE outcomes (seq INTEGER PRIMARY KEY AUTOINCREMENT, key TEXT NOT NULL);  -- of this run, as they come
CREATE TABLE batches (
  token TEXT PRIMARY KEY,         -- ours, in the metadata of the batch; written before anything is uploaded
  created REAL NOT NULL,
  file_id TEXT, batch_id TEXT,
  state TEXT NOT NULL DEFAULT 'planned' CHECK (state IN ('planned', 'submitted', 'finished'))
);
"""


@dataclasses.dataclass(frozen=True)
class Claimed:
    """A request that this process is to send now; its worst case is reserved."""

    key: str
    body: Mapping[str, Any]
    tries: int  # before this one, in this run
    remote: str | None  # the server is at it already


@dataclasses.dataclass(frozen=True, kw_only=True)
class Account:
    """Money in billionths of a dollar, and tokens."""

    spent_nano: int
    spent_tokens: int
    reserved_nano: int
    reserved_tokens: int
    lost_nano: int
    lost_tokens: int
    budget_nano: int | None
    budget_tokens: int | None
    stop: str | None


@dataclasses.dataclass(frozen=True)
class Standing:
    """Where a run stands."""

    account: Account
    out: int  # requests that any process is at, those in batches apart
    in_batches: int  # requests in batches, which go on without us
    fits: bool  # the next open request is within the budget; true where there is none
    trouble: str | None = None  # why a request that waits for another attempt had no answer


class Ledger:
    """The ledger of one run folder. One command begins a run; its worker processes join it.

    What a method writes is on the disk when it returns: the write-ahead log is synchronized at each commit. Calls
    inside `transaction` are committed together at its end.

    Raises:
      UserError: another command holds it, or the file is not a ledger.
    """

    def __init__(self, path: Path, joins: bool = False):
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        self._lock = path.with_name(path.name + ".lock").open("a")
        if not joins:  # a killed command's last worker may still hold its share
            try:
                fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                self._lock.close()
                raise UserError(f"{path} is in use by another process; wait for it or choose another workdir") from None
        self.database = sqlite3.connect(path, isolation_level=None, timeout=60.0, check_same_thread=False)
        try:
            self.database.execute("PRAGMA journal_mode = WAL")
            self.database.execute("PRAGMA synchronous = FULL")
            self._create(path)
        except sqlite3.DatabaseError as error:
            self.close()
            _raise_if_refused(error, path)
            raise UserError(f"{path} is not a usable ledger ({error}); move it away to start afresh") from None
        except UserError:
            self.close()
            raise
        fcntl.flock(self._lock, fcntl.LOCK_SH)

    def _create(self, path: Path) -> None:
        (version,) = self.database.execute("PRAGMA user_version").fetchone()
        (tables,) = self.database.execute("SELECT count(*) FROM sqlite_master").fetchone()
        if not tables:
            self.database.executescript(f"BEGIN; {_SCHEMA} PRAGMA user_version = {VERSION}; COMMIT")
        elif version != VERSION:
            raise UserError(
                f"{path} was written by another version of jaxdistill (format {version}, this one reads {VERSION}); "
                "go on with that version or choose another workdir"
            )

    def __enter__(self) -> "Ledger":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Closes the file and lets others have it."""
        self.database.close()
        self._lock.close()

    @contextlib.contextmanager
    def transaction(self) -> Iterator[None]:
        """One commit for all that is written inside; nothing of it if anything fails."""
        if self.database.in_transaction:
            yield
            return
        try:
            self.database.execute("BEGIN IMMEDIATE")
            yield
            self.database.execute("COMMIT")
        except BaseException as error:
            if self.database.in_transaction:  # a full disk has rolled back already
                self.database.execute("ROLLBACK")
            _raise_if_refused(error, self.path)
            raise

    def begin(self, budget_nano: int | None = None, budget_tokens: int | None = None) -> None:
        """Starts a run: what a killed one left under way may have been paid for, and counts at its worst case.

        What a server works on under an id, or in a batch, is not lost: it is asked for by that id.
        """
        with self.transaction():
            run = self.database.execute
            where = "state = 'sent' AND remote IS NULL"
            run(
                "UPDATE account SET budget_nano = ?, budget_tokens = ?, stop = NULL, "
                f"lost_nano = lost_nano + (SELECT total(worst_nano) FROM requests WHERE {where}), "
                f"lost_tokens = lost_tokens + (SELECT total(worst_tokens) FROM requests WHERE {where})",
                (budget_nano, budget_tokens),
            )
            run(f"UPDATE requests SET failure = 'the run ended before the answer came' WHERE {where}")
            run(
                "UPDATE requests SET state = 'idle', due = 0, tries = 0 WHERE state IN ('open', 'sent', 'failed') "
                "AND (remote IS NULL OR remote NOT IN (SELECT token FROM batches WHERE state != 'finished'))"
            )
            run(  # an answer that a server is at under an id is out, whoever asks for it
                "UPDATE account SET (reserved_nano, reserved_tokens) = (SELECT total(worst_nano), total(worst_tokens) "
                "FROM requests WHERE state IN ('sent', 'answered') OR remote IS NOT NULL AND state = 'idle')"
            )
            run("DELETE FROM outcomes")

    def record(self, requests: Iterable[tuple[Request, int, int]]) -> None:
        """Writes requests down before any is sent, each with the most it can cost (billionths of a dollar, tokens).

        Those that have an answer or a refusal stay as they are; all others are to be sent in this run. In ASCII: SQLite
        refuses half a surrogate pair.
        """
        now = time.time()
        with self.transaction():
            self.database.executemany(
                "INSERT INTO requests (key, body, sample_index, prompt, recorded, state, worst_nano, worst_tokens) "
                "VALUES (?, ?, ?, ?, ?, 'open', ?, ?) ON CONFLICT (key) DO UPDATE SET state = 'open', "
                "due = remote IS NOT NULL, "  # what a server works on already comes first
                "worst_nano = iif(remote IS NULL, excluded.worst_nano, worst_nano), "
                "worst_tokens = iif(remote IS NULL, excluded.worst_tokens, worst_tokens) WHERE state = 'idle'",
                (
                    (r.key, json.dumps(r.body), r.sample_index, r.prompt, now, nano, tokens)
                    for r, nano, tokens in requests
                ),
            )

    def claim(self, count: int, now: float) -> list[Claimed]:
        """Takes up to `count` open requests and reserves their worst cases: those due again first, then new ones."""
        with self.transaction():
            account = self.account()
            columns = "SELECT key, body, tries, remote, worst_nano, worst_tokens FROM requests WHERE state = 'open' AND"
            rows: list[Any] = []
            if account.stop is None and count > 0:
                due = f"{columns} due > 0 AND due <= ? ORDER BY due LIMIT ?"
                rows = self.database.execute(due, (now, count)).fetchall()
                new = f"{columns} due = 0 ORDER BY id LIMIT ?"
                rows += self.database.execute(new, (count - len(rows),)).fetchall()
            nano, tokens = account.reserved_nano, account.reserved_tokens
            claimed: list[Claimed] = []
            for key, body, tries, remote, worst_nano, worst_tokens in rows:
                if remote is None:  # otherwise it is reserved already
                    nano, tokens = nano + worst_nano, tokens + worst_tokens
                    if not _fits(account, nano, tokens):
                        nano, tokens = nano - worst_nano, tokens - worst_tokens
                        break
                claimed.append(Claimed(key, json.loads(body), tries, remote))
            if claimed:
                keys = [(request.key,) for request in claimed]
                self.database.executemany("UPDATE requests SET state = 'sent' WHERE key = ?", keys)
                self.database.execute("UPDATE account SET reserved_nano = ?, reserved_tokens = ?", (nano, tokens))
            return claimed

    def answer(self, key: str, response: Response) -> None:
        """Commits the raw bytes of an answer; its worst case stays reserved until it was read."""
        with self.transaction():
            self.database.execute(
                "INSERT INTO responses (key, request_id, sent, received, raw) VALUES (?, ?, ?, ?, ?)",
                (key, response.request_id, response.sent, response.received, response.raw),
            )
            self._leave(key, "answered", None)

    def settle(self, key: str, nano: int | None, tokens: int | None) -> None:
        """Books what an answer cost in place of its worst case; None where its usage is unknown: the worst case."""
        with self.transaction():
            worst_nano, worst_tokens = self._worst(key)
            nano, tokens = worst_nano if nano is None else nano, worst_tokens if tokens is None else tokens
            self.database.execute("UPDATE responses SET nano = ?, tokens = ? WHERE key = ?", (nano, tokens, key))
            self.database.execute("UPDATE requests SET state = 'done', remote = NULL WHERE key = ?", (key,))
            self._release(worst_nano, worst_tokens, spent=(nano, tokens))
            self.database.execute("INSERT INTO outcomes (key) VALUES (?)", (key,))

    def unsettled(self) -> list[tuple[str, bytes]]:
        """Answers that a killed run has not read."""
        return self.database.execute(
            "SELECT key, raw FROM responses JOIN requests USING (key) WHERE state = 'answered'"
        ).fetchall()

    def retry(self, key: str, detail: str, due: float, *, lost: bool, tried: bool = True) -> None:
        """Puts a request back, to be sent at `due` (seconds since the epoch); `lost`: it may have been billed."""
        with self.transaction():
            self._give_back(key, lost)
            self._leave(key, "open", detail, due=due, tried=tried)

    def fail(self, key: str, failure: Failure, *, lost: bool = False) -> None:
        """Notes why there is no answer; unless that is permanent the next run asks again."""
        with self.transaction():
            self._give_back(key, lost)
            self._leave(key, "refused" if failure.permanent else "failed", failure.detail)
            self.database.execute("INSERT INTO outcomes (key) VALUES (?)", (key,))

    def accepted(self, key: str, remote: str) -> None:
        """The server works on a request and has given it an id: from now on it is asked for by that."""
        with self.transaction():
            self.database.execute("UPDATE requests SET remote = ? WHERE key = ?", (remote, key))

    def stop(self, reason: str) -> None:
        """No process sends anything more in this run; the first reason stays."""
        with self.transaction():
            self.database.execute("UPDATE account SET stop = coalesce(stop, ?)", (reason,))

    def _leave(
        self,
        key: str,
        state: Literal["open", "answered", "failed", "refused"],
        why: str | None,
        due: float = 0,
        tried: bool = True,
    ) -> None:
        remote = "" if state == "answered" else ", remote = NULL"
        self.database.execute(
            f"UPDATE requests SET state = ?, attempts = attempts + ?, tries = tries + ?, failure = ?, due = ?{remote} "
            "WHERE key = ?",
            (state, tried, tried, why, due, key),
        )

    def _worst(self, key: str) -> tuple[int, int]:
        return self.database.execute("SELECT worst_nano, worst_tokens FROM requests WHERE key = ?", (key,)).fetchone()

    def _give_back(self, key: str, lost: bool) -> None:
        worst = self._worst(key)
        self._release(*worst, lost=worst if lost else (0, 0))

    def _release(self, nano: int, tokens: int, spent: tuple[int, int] = (0, 0), lost: tuple[int, int] = (0, 0)) -> None:
        self.database.execute(
            "UPDATE account SET reserved_nano = reserved_nano - ?, reserved_tokens = reserved_tokens - ?, "
            "spent_nano = spent_nano + ?, spent_tokens = spent_tokens + ?, "
            "lost_nano = lost_nano + ?, lost_tokens = lost_tokens + ?",
            (nano, tokens, *spent, *lost),
        )

    def account(self) -> Account:
        """What was spent, is reserved, and may be."""
        names = [field.name for field in dataclasses.fields(Account)]
        row = self.database.execute(f"SELECT {', '.join(names)} FROM account").fetchone()
        return Account(**dict(zip(names, row, strict=True)))

    def standing(self) -> Standing:
        """Where the run stands."""
        account = self.account()
        (out,) = self.database.execute("SELECT count(*) FROM requests WHERE state IN ('sent', 'answered')").fetchone()
        (in_batches,) = self.database.execute(
            "SELECT count(*) FROM requests WHERE state = 'sent' AND "
            "remote IN (SELECT token FROM batches WHERE state != 'finished')"
        ).fetchone()
        following = self.database.execute(
            "SELECT worst_nano, worst_tokens FROM requests WHERE state = 'open' AND remote IS NULL "
            "ORDER BY due > 0, due, id LIMIT 1"
        ).fetchone() or (0, 0)
        fits = _fits(account, account.reserved_nano + following[0], account.reserved_tokens + following[1])
        trouble = self.database.execute(
            "SELECT failure FROM requests WHERE state = 'open' AND due > 0 AND tries > 0 LIMIT 1"
        ).fetchone()
        return Standing(account, out - in_batches, in_batches, fits, trouble[0] if trouble else None)

    def outcomes(self, after: int) -> list[tuple[int, str]]:
        """(sequence number, key) of the requests that got an outcome in this run, later than a sequence number."""
        return self.database.execute(
            "SELECT seq, key FROM outcomes WHERE seq > ? ORDER BY seq LIMIT 1000", (after,)
        ).fetchall()

    def settled(self, keys: Iterable[str]) -> set[str]:
        """Which of the requests have an answer or a refusal, from whatever run, or were given up in this one."""
        found = self.database.execute(
            "SELECT key FROM requests WHERE key IN (SELECT value FROM json_each(?)) "
            "AND state IN ('done', 'refused', 'failed')",
            (json.dumps(list(keys)),),
        )
        return {key for (key,) in found}

    def result(self, key: str) -> Response | Failure:
        """The answer to a recorded request, or why there is none."""
        row = self.database.execute(
            "SELECT state, attempts, failure, request_id, sent, received, raw, nano "
            "FROM requests LEFT JOIN responses USING (key) WHERE key = ?",
            (key,),
        ).fetchone()
        if row is None:
            raise KeyError(f"request {key} was never recorded")
        state, attempts, failure, request_id, sent, received, raw, nano = row
        if raw is not None:
            found = {"raw": raw, "request_id": request_id, "sent": sent, "received": received, "nano": nano or 0}
            return Response(**found, attempts=attempts)
        return Failure(detail=failure or "not answered yet", permanent=state == "refused", attempts=attempts)


def _fits(account: Account, reserved_nano: int, reserved_tokens: int) -> bool:
    nano = account.spent_nano + account.lost_nano + reserved_nano
    tokens = account.spent_tokens + account.lost_tokens + reserved_tokens
    return (account.budget_nano is None or nano <= account.budget_nano) and (
        account.budget_tokens is None or tokens <= account.budget_tokens
    )


def _raise_if_refused(error: BaseException, path: Path) -> None:
    """SQLite's words for a disk that is full, said as the operating system says it, or that does not work."""
    code = getattr(error, "sqlite_errorcode", 0)
    if code == sqlite3.SQLITE_FULL:
        raise disk_full(path) from error
    if code & 0xFF == sqlite3.SQLITE_IOERR:
        raise RunError(
            f"{path} cannot be read or written ({error}); see to the disk, and to limits on a file's size "
            "(`ulimit -f`), then run the same command again: what was committed is kept"
        ) from error
