"""What a user sees while a run goes on: outcomes, speed, tokens, dollars, time left."""

import collections
import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from jaxdistill.collect.calls import Judged
from jaxdistill.collect.ledger import Account
from jaxdistill.collect.prices import NANO
from jaxdistill.progress import Progress

_RATE_S = 30.0  # seconds over which requests/s is taken


class Board:
    """One bar and a line of figures."""

    def __init__(self, progress: Progress, title: str):
        self._progress, self._bar = progress, progress.add_task(title, total=0, figures="")
        self._counts: collections.Counter[str] = collections.Counter()
        self._times: collections.deque[float] = collections.deque()

    def judged(self, judged: Judged, *, earlier: bool) -> None:
        """Counts one call; `earlier`: its answer was there before this run."""
        self._counts[judged.reason or "verified"] += 1
        if not earlier:
            self._times.append(time.monotonic())

    def show(self, account: Account, total: int, trouble: str | None) -> None:
        """Draws it; `trouble`: why something is about to be tried again."""
        now = time.monotonic()
        while self._times and self._times[0] < now - _RATE_S:
            self._times.popleft()
        span_s = min(_RATE_S, max(1.0, now - self._times[0])) if self._times else 1.0
        names = ("verified", "wrong", "truncated", "failed")
        figures = [f"{self._counts[name]} {name}" for name in names]
        figures += [f"{len(self._times) / span_s:.1f} requests/s", f"{account.spent_tokens:,} tokens"]
        figures += [dollars(account)]
        figures += [f"trying again: {' '.join(trouble.split())[:100]}"] if trouble else []
        done = sum(self._counts.values())
        self._progress.update(self._bar, completed=done, total=max(total, done), figures="  ".join(figures))


def dollars(account: Account) -> str:
    """`$1.20 spent, $0.30 reserved`, and what may have been paid for answers that never came."""
    lost = f", up to ${account.lost_nano / NANO:.2f} for answers that never came" if account.lost_nano else ""
    return f"${account.spent_nano / NANO:.2f} spent, ${account.reserved_nano / NANO:.2f} reserved{lost}"


@contextmanager
def board(title: str) -> Iterator[Board]:
    """A board on standard error."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=20),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[figures]}"),
    )
    with Progress(*columns, console=Console(stderr=True)) as progress:
        yield Board(progress, title)
