"""What a run shows while it works, host by host: a heartbeat, where it hangs, the memory of its devices, a profile."""

import contextlib
import faulthandler
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import jax

from jaxdistill import manifest
from jaxdistill.errors import UserError

_HOSTS = "hosts"
_EVERY_S = 10.0  # seconds between two heartbeats


class Watch:
    """Of one process: `hosts/<number>.json` says where it is; `hosts/<number>.stacks` where every thread hangs.

    Args:
      silence_s: without a beat after which the stacks of all threads are written, again and again.
    """

    def __init__(self, workdir: Path, silence_s: float):
        number = jax.process_index()
        self._path = workdir / _HOSTS / f"{number}.json"
        self._silence_s, self._beaten = silence_s, 0.0
        self._stacks: IO[str] | None = None

    def __enter__(self) -> "Watch":
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._stacks = self._path.with_suffix(".stacks").open("w", encoding="utf-8")
        self.beat("start-up", 0)
        return self

    def __exit__(self, *exception: object) -> None:
        faulthandler.cancel_dump_traceback_later()
        if self._stacks is not None:
            self._stacks.close()

    def beat(self, phase: str, step: int) -> None:
        """This process has come to here."""
        if self._stacks is None:
            return
        # A thread in C does it, so that a Python which holds its lock for ever is shown as well
        faulthandler.dump_traceback_later(self._silence_s, repeat=True, file=self._stacks)
        if (now := time.monotonic()) - self._beaten >= _EVERY_S or not self._beaten:
            self._beaten = now
            facts = {"host": socket.gethostname(), "phase": phase, "step": step, "time": time.time(), **memory_peaks()}
            manifest.write_json(self._path, facts)


def memory_peaks() -> dict[str, float]:
    """High-water mark of each of this process's devices in bytes, by `memory_peak/<device>`; CPUs do not say."""
    marks = {device.id: (device.memory_stats() or {}).get("peak_bytes_in_use") for device in jax.local_devices()}
    return {f"memory_peak/{id_}": float(mark) for id_, mark in marks.items() if mark is not None}


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
