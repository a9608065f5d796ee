"""What is said of a checkpoint that cannot be read back as it was saved."""

import gc
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from jaxdistill.errors import RunError, UserError


class DamagedError(RunError):
    """A checkpoint cannot be read back as it was saved; the message names it and what is wrong."""


def attempt(place: Path, read: Callable[[], Any]) -> Any:
    """What `read` gives of a checkpoint.

    Raises:
      DamagedError: for whatever Orbax and tensorstore raise for files that are cut, lost or mixed, a plain Exception
        among them; what is of this package or of a device's memory comes through.
    """
    try:
        return read()
    except (RunError, UserError, jax.errors.JaxRuntimeError):
        raise
    except Exception as error:
        wrong = _innermost(error)
    _forget_other_reads()
    raise DamagedError(f"{place} cannot be read ({wrong})")


def refuse(place: Path, changed: list[str]) -> None:
    """Says that arrays of a checkpoint are not those that were saved, if there are any such.

    Raises:
      DamagedError: there are.
    """
    if changed:
        raise DamagedError(f"{place} is not what was saved: {', '.join(changed)}")


def _innermost(error: BaseException) -> str:
    """The first cause of an exception in a line, without traces and status codes."""
    while inner := error.__cause__ or (None if error.__suppress_context__ else error.__context__):
        error = inner
    return f"{type(error).__name__}: {error}".splitlines()[0][:200]


def _forget_other_reads() -> None:
    """Waits for the reads beside the one that failed.

    Orbax ends its event loop under them. Each tells Python, which would print what nobody asked about, at any time.
    """
    hook, seen = sys.unraisablehook, [0]

    def count(_: Any) -> None:
        seen[0] += 1

    sys.unraisablehook = count
    try:
        for _ in range(8):
            before = seen[0]
            gc.collect()
            time.sleep(0.25)
            if seen[0] == before:
                break
    finally:
        sys.unraisablehook = hook
