"""Takes open requests from the ledger and sends them, as many at a time as the server bears; one per process."""

import asyncio
import time
from collections.abc import Callable, Mapping

from jaxdistill.collect import transports
from jaxdistill.collect.api import Again, Api, Outcome, connected
from jaxdistill.collect.booking import Booking
from jaxdistill.collect.commits import Commits
from jaxdistill.collect.ledger import Claimed
from jaxdistill.collect.pace import Pace
from jaxdistill.collect.request import Failure, Response
from jaxdistill.collect.teacher import Teacher

_IDLE_S = 0.1  # seconds between two looks at a ledger that had nothing to send


class Sender:
    """One process's share of a run. Everything it learns goes to the ledger at once."""

    def __init__(self, teacher: Teacher, commits: Commits, ended: Callable[[], bool]):
        self.teacher, self.config, self.commits = teacher, teacher.config, commits
        self.ledger = commits.ledger
        self.pace = Pace(self.config.in_flight)
        self._booking = Booking(teacher, commits)
        self._ended = ended  # nothing more is to be taken
        self._tasks: set[asyncio.Task[None]] = set()
        self._woken = asyncio.Event()
        self._error: BaseException | None = None

    async def run(self) -> None:
        """Sends until `ended`, then lets what is under way finish.

        Raises:
          OSError: the ledger's disk is full.
        """
        async with connected(self.config) as api:
            try:
                while not self._ended() and self._error is None:
                    await self._take(api)
                while self._tasks:
                    await asyncio.wait(self._tasks)
            finally:
                for task in self._tasks:  # only if this was cancelled: a second Ctrl-C
                    task.cancel()
        if self._error:
            raise self._error

    async def _take(self, api: Api) -> None:
        """Starts what there is room for; without any, waits until something changes."""
        self._woken.clear()
        room = self.pace.room(time.monotonic())
        claimed = await self.commits(self.ledger.claim, room, time.time()) if room else []
        if claimed:
            self.pace.sent(len(claimed))
            for request in claimed:
                task = asyncio.create_task(self._one(api, request))
                self._tasks.add(task)
                task.add_done_callback(self._tasks.discard)
            return
        wait_s = _IDLE_S if room else max(_IDLE_S, min(self.pace.wait_s(), 5.0))
        try:
            await asyncio.wait_for(self._woken.wait(), wait_s)
        except TimeoutError:
            return

    async def _one(self, api: Api, request: Claimed) -> None:
        try:
            sent = time.monotonic()
            try:
                outcome = await self._attempt(api, request)
            finally:
                self.pace.ended()
                self._woken.set()
            tokens = await self._booking.book(request.key, request.tries, outcome)
            if isinstance(outcome, Response):
                self.pace.answered(tokens)
            elif isinstance(outcome, Again) and outcome.busy:
                self.pace.pushed_back(sent, time.monotonic())
        except Exception as error:  # the ledger's disk is full: end the run, not this task alone
            self._error = self._error or error

    async def _attempt(self, api: Api, request: Claimed) -> Outcome:
        def told(headers: Mapping[str, str]) -> None:
            self.pace.told(headers, time.monotonic())

        # By its body, not by the transport: a batch of an earlier run may have left it open.
        send = transports.chat if "messages" in request.body else transports.responses
        try:
            if self.teacher.transport == "background" and send is transports.responses:

                async def accepted(remote: str) -> None:
                    await self.commits(self.ledger.accepted, request.key, remote)

                return await transports.background(
                    api, request.body, told, request.remote, accepted, self.config.poll_s
                )
            return await send(api, request.body, told)
        except UnicodeEncodeError as error:
            return Failure(detail=f"the text cannot be sent as UTF-8: {error.reason}", permanent=True)
