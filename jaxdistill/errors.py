"""What ends a command with one message instead of a traceback; cli.py turns them into exit codes 2 and 1."""

import errno
import os
from pathlib import Path


class UserError(ValueError):
    """A mistake in the input: the message says what was found, what was expected and what to do."""


class RunError(RuntimeError):
    """A run that cannot go on although the input was well-formed: the message says what happened and what to do."""


def disk_full(place: Path) -> OSError:
    """A full disk as the operating system says it, for libraries that have words of their own."""
    return OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(place))
