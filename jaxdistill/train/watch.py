"""What each host says of itself while a run works, whether it still does, and where it hangs; its devices' memory."""

import contextlib
import faulthandler
import json
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import jax

from jaxdistill import manifest

_FOLDER = "hosts"
EVERY_S = 5.0  # seconds between two heartbeats
_STALLED_S = 15.0  # without a step, after which one looks whether the other hosts are alive; it may just be a long one


class Watch:
    """Of one process: `hosts/<number>.json` is its heartbeat; `hosts/<number>.stacks` is where every thread hangs.

    A thread keeps the heartbeat, whatever the process waits for. Where no step is done for long it also looks at those
    of the others, and tells of each that has stopped: their part of a collective will never come.

    Args:
      silence_s: without a step after which the stacks of all threads are written, again and again.
      tell: called with a line about each host that is lost.
    """

    def __init__(self, workdir: Path, silence_s: float, tell: Callable[[str], None]):
        self._folder = workdir / _FOLDER
        self._path = self._folder / f"{jax.process_index()}.json"
        self._silence_s, self._tell = silence_s, tell
        self._phase, self._step, self._advanced = "start-up", 0, time.monotonic()
        self._told: set[str] = set()
        self._stacks: IO[str] | None = None
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._keep, name="heartbeat", daemon=True)

    def __enter__(self) -> "Watch":
        self._folder.mkdir(parents=True, exist_ok=True)
        self._stacks = self._path.with_suffix(".stacks").open("w", encoding="utf-8")
        self._write()
        self._thread.start()
        self.beat("start-up", 0)
        return self

    def __exit__(self, *exception: object) -> None:
        self._ended.set()
        self._thread.join()
        self._write()
        faulthandler.cancel_dump_traceback_later()
        if self._stacks is not None:
            self._stacks.close()

    def beat(self, phase: str, step: int) -> None:
        """This process has done a step."""
        self._phase, self._step, self._advanced = phase, step, time.monotonic()
        if self._stacks is not None:
            # A thread in C does it, so that a Python which holds its lock for ever is shown as well
            faulthandler.dump_traceback_later(self._silence_s, repeat=True, file=self._stacks)

    def _keep(self) -> None:
        while not self._ended.wait(EVERY_S):
            self._write()
            if jax.process_count() > 1 and time.monotonic() - self._advanced > _STALLED_S:
                for words in self.lost():
                    if words not in self._told:
                        self._told.add(words)
                        self._tell(words)

    def _write(self) -> None:
        facts = {"host": socket.gethostname(), "phase": self._phase, "step": self._step, "time": time.time()}
        with contextlib.suppress(OSError):  # a full disk ends the run where it writes what matters
            manifest.write_json(self._path, {**facts, **memory_peaks(), "ended": self._ended.is_set()})

    def lost(self) -> list[str]:
        """A line about each of the other processes that has not ended and whose heartbeat has; takes 2.5 beats.

        A heartbeat counts as long as it changes, whatever the clocks of the hosts say.
        """
        before = self._others()
        time.sleep(2.5 * EVERY_S)
        after = self._others()
        still = [number for number, facts in after.items() if facts == before.get(number) and not facts["ended"]]
        return [_in_words(number, after[number]) for number in sorted(still)]

    def _others(self) -> dict[int, dict[str, Any]]:
        numbers = (number for number in range(jax.process_count()) if number != jax.process_index())
        paths = {number: self._folder / f"{number}.json" for number in numbers}
        return {n: json.loads(path.read_text(encoding="utf-8")) for n, path in paths.items() if path.is_file()}


def _in_words(number: int, facts: dict[str, Any]) -> str:
    when = time.strftime("%H:%M:%S", time.localtime(facts["time"]))
    place = f"{facts['phase']} step {facts['step']}"
    return f"process {number} on {facts['host']} is lost: last heard of at {when}, {place}"


def memory_peaks() -> dict[str, float]:
    """High-water mark of each of this process's devices in bytes, by `memory_peak/<device>`; CPUs do not say."""
    marks = {device.id: (device.memory_stats() or {}).get("peak_bytes_in_use") for device in jax.local_devices()}
    return {f"memory_peak/{id_}": float(mark) for id_, mark in marks.items() if mark is not None}
