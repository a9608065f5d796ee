"""A profile of some steps of a phase: `--profile-steps a:b`."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

import jax

from jaxdistill.errors import UserError


class Profile:
    """An XProf trace of some steps of a phase, of every host, in `profile` of the phase's folder.

    Args:
      steps: the first and the last one, as "a:b"; None for none.
    """

    def __init__(self, folder: Path, steps: str | None):
        self.folder = folder / "profile"
        self._first, self._last = span(steps) if steps else (0, -1)
        self._running = False

    def starts_at(self, step: int) -> bool:
        """Whether the trace is to begin with this step."""
        return not self._running and self._first <= step <= self._last

    def start(self) -> None:
        """Begins to trace; what ran before should be finished."""
        jax.profiler.start_trace(str(self.folder))
        self._running = True

    def ends_at(self, step: int) -> bool:
        """Whether this step is the last one of a trace that runs."""
        return self._running and step >= self._last

    def stop(self) -> None:
        """Writes the trace, if one runs."""
        if self._running:
            self._running = False
            jax.profiler.stop_trace()


@contextlib.contextmanager
def profile(folder: Path, steps: str | None) -> Iterator[Profile]:
    """A `Profile` that is written also where the block raises."""
    made = Profile(folder, steps)
    try:
        yield made
    finally:
        made.stop()


def span(steps: str) -> tuple[int, int]:
    """The first and the last step of "a:b".

    Raises:
      UserError: it is something else.
    """
    first, _, last = steps.partition(":")
    if not (first.isdigit() and last.isdigit() and 1 <= int(first) <= int(last)):
        raise UserError(f"profile_steps is {steps!r}; expected the first and the last step as a:b, such as 10:12")
    return int(first), int(last)
