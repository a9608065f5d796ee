"""Where the wall time of a training run went, over all its starts: steps that count, and all else by its cause."""

import contextlib
import json
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from jaxdistill import manifest

# In the order shown. restart: from the last word of a start that ended to the launch of the next; lost: steps that were
# done again because no checkpoint held them; input: waiting for a batch while the devices had nothing to do
KINDS = ("start-up", "compile", "input", "checkpoint", "evaluation", "restart", "lost")
_STEPS, _EVERY_S = "steps", 10.0  # seconds between two writes: what a start that is killed may leave out
_FILE = "goodput.json"


class Goodput:
    """The clock of a run: at any time its seconds go to one kind. Kept in `goodput.json` of the run folder.

    Args:
      launched: when this process was, seconds since the epoch.
      writes: to disk; of several processes one does.
    """

    def __init__(self, workdir: Path, launched: float, writes: bool = True):
        self._path, self._writes = workdir / _FILE, writes
        earlier = read(workdir)
        self._seconds: dict[str, float] = defaultdict(float, earlier.get("seconds", {}))
        self._productive: dict[str, float] = defaultdict(float, earlier.get("productive", {}))  # by phase
        self._saved: dict[str, dict[str, float]] = earlier.get("saved", {})  # of those, at each step saved, by phase
        self._first_steps: list[float] = earlier.get("first_step_s", [])
        self._starts = earlier.get("starts", 0) + 1
        if "ended" in earlier:
            self._seconds["restart"] += max(0.0, launched - earlier["ended"])
        self._kind, self._phase, self._launched = "start-up", "", launched
        self._since = time.perf_counter() - max(0.0, time.time() - launched)
        self._written = self._since
        self._first = False

    def turn_to(self, kind: str) -> None:
        """From now on the time goes to this kind."""
        now = time.perf_counter()
        if self._kind == _STEPS:
            self._productive[self._phase] += now - self._since
        else:
            self._seconds[self._kind] += now - self._since
        self._kind, self._since = kind, now
        if now - self._written > _EVERY_S:
            self.keep()

    @contextlib.contextmanager
    def on(self, kind: str) -> Iterator[None]:
        """The block's time goes to this kind."""
        before = self._kind
        self.turn_to(kind)
        try:
            yield
        finally:
            self.turn_to(before)

    def wasted(self, kind: str, seconds: float) -> None:
        """So many of the seconds that went to steps since the last turn were of this kind instead."""
        self._seconds[kind] += seconds
        self._since += seconds

    def begin(self, phase: str, step: int) -> None:
        """A phase goes on after this step; what was done of it beyond is lost."""
        self.turn_to(self._kind)
        self._phase = phase
        saved = self._saved.setdefault(phase, {})
        kept = saved.get(str(step), 0.0)
        self._seconds["lost"] += self._productive[phase] - kept
        self._productive[phase] = kept
        self._saved[phase] = {s: seconds for s, seconds in saved.items() if int(s) <= step} | {str(step): kept}
        self.keep()

    def saved(self, step: int) -> None:
        """The phase's steps up to this one are in a checkpoint."""
        self.turn_to(self._kind)
        self._saved[self._phase][str(step)] = self._productive[self._phase]

    def first_step(self) -> float | None:
        """To be called after every step: seconds from the launch to the end of the first, None later."""
        if self._first:
            return None
        self._first = True
        self._first_steps.append(round(time.time() - self._launched, 3))
        return self._first_steps[-1]

    @property
    def wall_s(self) -> float:
        """Seconds since the launch."""
        return time.time() - self._launched

    def keep(self) -> None:
        """Writes it down."""
        self._written = time.perf_counter()
        if self._writes:
            manifest.write_json(self._path, self.facts())

    def close(self) -> None:
        """Counts the last stretch and writes it down."""
        self.turn_to(self._kind)
        self.keep()

    def facts(self) -> dict[str, Any]:
        """What the file holds."""
        return {
            "starts": self._starts,
            "ended": time.time(),
            "seconds": {kind: self._seconds[kind] for kind in KINDS},
            "productive": dict(self._productive),
            "saved": self._saved,
            "first_step_s": self._first_steps,
        }


def read(workdir: Path) -> dict[str, Any]:
    """What `goodput.json` of a run folder holds; empty where there is none."""
    path = workdir / _FILE
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def in_words(facts: Mapping[str, Any]) -> str:
    """One line: the share of the wall time that went to steps which count, and what else took how much of it."""
    steps = sum(facts["productive"].values())
    wall = steps + sum(facts["seconds"].values())
    rest = [f"{kind} {seconds / wall:.1%}" for kind, seconds in facts["seconds"].items() if seconds >= 0.0005 * wall]
    starts = f"{facts['starts']} start{'s' * (facts['starts'] > 1)}"
    return f"{steps / wall:.1%} of {wall:,.0f} s over {starts} were steps; {', '.join(rest) or 'nothing else'}"
