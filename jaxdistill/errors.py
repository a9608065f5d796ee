"""What ends a command with one message instead of a traceback, and the exit codes that cli.py makes of it."""

import errno
import os
from pathlib import Path

FAILED, MISTAKE, PREEMPTED = 1, 2, 75  # exit codes; what launches a run starts it again on the first and the last


class UserError(ValueError):
    """A mistake in the input: the message says what was found, what was expected and what to do."""


class RunError(RuntimeError):
    """A run that cannot go on although the input was well-formed: the message says what happened and what to do."""


class PreemptedError(RunError):
    """The machines are about to be taken away; everything is saved, and the same command goes on from there."""


class LostHostError(RunError):
    """Another process of the job has ended without a word; all are to be started again."""


class StuckError(RunError):
    """Something was given up that threads still wait for, perhaps for ever: the process must end without them."""


def disk_full(place: Path) -> OSError:
    """A full disk as the operating system says it, for libraries that have words of their own."""
    return OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(place))
