"""Room that a run sets aside on its disk before it asks anything, so that what it has paid for can still be kept."""

import errno
import os
from pathlib import Path

from jaxdistill.errors import RunError, disk_full

DISK_FULL = "the disk is full"  # why a run ended whose spare room was needed
_LEAST_BYTES = 4 << 20  # for the files written at the end, and for the ledger's own pages
_BYTES_A_TOKEN = 8  # of an answer in the ledger and in its write-ahead log


def hold(ledger: Path, requests: int, max_tokens: int) -> None:
    """Sets room aside beside a ledger for the answers of so many requests under way.

    Raises:
      OSError: the disk has no such room.
      RunError: it refuses so large a file.
    """
    path, size = _path(ledger), _LEAST_BYTES + requests * max_tokens * _BYTES_A_TOKEN
    try:
        with path.open("wb") as file:
            _fill(file.fileno(), size)
    except OSError as error:
        release(ledger)
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise disk_full(ledger.parent) from error
        raise RunError(
            f"{path}: no room could be set aside for {requests} answers, {size:,} bytes ({error}); mend this, or have "
            "fewer under way with --teacher.in-flight"
        ) from error


def release(ledger: Path) -> None:
    """Gives the room back."""
    _path(ledger).unlink(missing_ok=True)


def _path(ledger: Path) -> Path:
    return ledger.with_name(f"{ledger.name}.spare")


def _fill(file: int, size: int) -> None:
    try:
        os.posix_fallocate(file, 0, size)
    except (AttributeError, OSError) as error:  # macOS and some file systems cannot
        if isinstance(error, OSError) and error.errno not in (errno.EINVAL, errno.EOPNOTSUPP):
            raise
        for start in range(0, size, 1 << 20):
            os.write(file, b"\0" * min(1 << 20, size - start))
