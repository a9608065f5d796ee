"""What became of the samples of each problem, on a disk: of a file of any length a few rows are in memory."""

import pickle
import sqlite3
import tempfile
import weakref
from pathlib import Path
from typing import Any

from jaxdistill.errors import RunError, disk_full


class Outcomes:
    """Results by number of the problem and of the sample, in a database under $TMPDIR that is gone with this process.

    Nothing depends on it: it is made again of the ledger's answers by the next run.

    Raises:
      OSError: that disk is full.
      RunError: nothing can be written there.
    """

    def __init__(self):
        self._database = sqlite3.connect("", isolation_level=None, check_same_thread=False)
        weakref.finalize(self, self._database.close)  # Python 3.13 warns of connections that are only forgotten
        self._database.execute("PRAGMA journal_mode = OFF")
        self._database.execute(
            "CREATE TABLE outcomes (number INTEGER, sample INTEGER, value BLOB, PRIMARY KEY (number, sample)) "
            "WITHOUT ROWID"
        )
        self._database.execute("CREATE TABLE paid (key TEXT, nano INTEGER)")

    def put(self, number: int, sample: int, value: Any) -> None:
        """Keeps one result in place of an earlier one."""
        self._write("INSERT OR REPLACE INTO outcomes VALUES (?, ?, ?)", number, sample, pickle.dumps(value))

    def of(self, number: int) -> list[tuple[int, Any]]:
        """(sample, result) of a problem, in the order of the samples."""
        rows = self._database.execute("SELECT sample, value FROM outcomes WHERE number = ? ORDER BY sample", (number,))
        return [(sample, pickle.loads(value)) for sample, value in rows.fetchall()]

    def pay(self, key: str, nano: int) -> None:
        """Notes what a request cost, in billionths of a dollar."""
        self._write("INSERT INTO paid VALUES (?, ?)", key, nano)

    def paid(self) -> int:
        """What all of them cost: requests of equal words are one, and paid for once."""
        each = "SELECT max(nano) AS nano FROM paid GROUP BY key"
        return self._database.execute(f"SELECT coalesce(sum(nano), 0) FROM ({each})").fetchone()[0]

    def _write(self, statement: str, *values: Any) -> None:
        try:
            self._database.execute(statement, values)
        except sqlite3.OperationalError as error:
            if getattr(error, "sqlite_errorcode", 0) == sqlite3.SQLITE_FULL:
                raise disk_full(Path(tempfile.gettempdir())) from error
            raise RunError(
                f"no results can be kept under {tempfile.gettempdir()} ({error}); mend this or set TMPDIR, and run the "
                "same command again: what was answered is kept"
            ) from error
