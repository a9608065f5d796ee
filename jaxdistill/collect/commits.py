"""The ledger beside an event loop: calls that come together share one commit, on a thread of their own."""

import asyncio
import errno
import queue
import threading
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

from jaxdistill.collect import spare
from jaxdistill.collect.ledger import Ledger

_GROUP = 512  # most calls in one commit

P = ParamSpec("P")
R = TypeVar("R")
_Call = tuple[Callable[[], Any], asyncio.Future[Any]]


class Commits:
    """Runs calls on a ledger in order; each returns once its commit is on the disk. One per event loop."""

    def __init__(self, ledger: Ledger):
        self.ledger = ledger
        self._loop = asyncio.get_running_loop()
        self._calls: queue.SimpleQueue[_Call | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work, name="ledger", daemon=True)
        self._thread.start()

    async def __aenter__(self) -> "Commits":
        return self

    async def __aexit__(self, *_: object) -> None:
        self._calls.put(None)
        await asyncio.to_thread(self._thread.join)

    def __call__(self, function: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> "asyncio.Future[R]":
        """Queues one call; the future has its result after the commit."""
        future: asyncio.Future[R] = self._loop.create_future()
        self._calls.put((lambda: function(*args, **kwargs), future))
        return future

    def _work(self) -> None:
        while (first := self._calls.get()) is not None:
            group, ended = [first], False
            while len(group) < _GROUP and not ended and not self._calls.empty():
                following = self._calls.get()
                if following is None:
                    ended = True
                else:
                    group.append(following)
            self._commit(group)
            if ended:
                return

    def _commit(self, group: list[_Call]) -> None:
        try:
            results = self._results(group)
        except BaseException as error:
            outcome: list[Any] = [error] * len(group)
            self._loop.call_soon_threadsafe(_resolve, group, outcome, True)
        else:
            self._loop.call_soon_threadsafe(_resolve, group, results, False)

    def _results(self, group: list[_Call]) -> list[Any]:
        """What the calls return; on a full disk the run is stopped, and its spare room takes what is under way."""
        try:
            with self.ledger.transaction():
                return [call() for call, _ in group]
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise
        spare.release(self.ledger.path)
        with self.ledger.transaction():
            self.ledger.stop(spare.DISK_FULL)  # first: nothing more is claimed
            return [call() for call, _ in group]


def _resolve(group: list[_Call], values: list[Any], failed: bool) -> None:
    for (_, future), value in zip(group, values, strict=True):
        if not future.cancelled():
            future.set_exception(value) if failed else future.set_result(value)
