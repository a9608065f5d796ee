"""Takes open requests from the ledger and sends them, as many at a time as the server bears; one per process."""

import asyncio
import random
import time
from collections.abc import Callable, Mapping

from jaxdistill.collect import transports
from jaxdistill.collect.api import Again, Api, Outcome, Stop, connected
from jaxdistill.collect.commits import Commits
from jaxdistill.collect.ledger import Claimed
from jaxdistill.collect.pace import Pace
from jaxdistill.collect.reply import read_usage
from jaxdistill.collect.request import Failure, Response
from jaxdistill.collect.teacher import Teacher

_IDLE_S = 0.1  # seconds between two looks at a ledger that had nothing to send


class Sender:
    """One process's share of a run. Everything it learns goes to the ledger at once."""

    def __init__(self, teacher: Teacher, commits: Commits, ended: Callable[[], bool]):
        self.teacher, self.config, self.commits = teacher, teacher.config, commits
        self.ledger = commits.ledger
        self.pace = Pace(self.config.in_flight)
        self._ended = ended  # nothing more is to be taken
        self._tasks: set[asyncio.Task[None]] = set()
        self._refused = 0  # requests refused since the last answer
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
            await self._book(request, outcome, sent)
        except Exception as error:  # the ledger's disk is full: end the run, not this task alone
            self._error = self._error or error

    async def _attempt(self, api: Api, request: Claimed) -> Outcome:
        def told(headers: Mapping[str, str]) -> None:
            self.pace.told(headers, time.monotonic())

        try:
            if self.teacher.transport == "background":

                async def accepted(remote: str) -> None:
                    await self.commits(self.ledger.accepted, request.key, remote)

                return await transports.background(
                    api, request.body, told, request.remote, accepted, self.config.poll_s
                )
            send = transports.responses if self.teacher.transport == "responses" else transports.chat
            return await send(api, request.body, told)
        except UnicodeEncodeError as error:
            return Failure(detail=f"the text cannot be sent as UTF-8: {error.reason}", permanent=True)

    async def _book(self, request: Claimed, outcome: Outcome, sent: float) -> None:
        """Writes down what came of an attempt."""
        if isinstance(outcome, Response):
            self._refused = 0
            await self.commits(self.ledger.answer, request.key, outcome)
            tokens = await settle(self.teacher, self.commits, request.key, outcome.raw)
            self.pace.answered(tokens)
        elif isinstance(outcome, Stop):
            self.commits(self.ledger.retry, request.key, outcome.reason, 0.0, lost=False, tried=False)
            await self.commits(self.ledger.stop, outcome.reason)
        elif isinstance(outcome, Failure):
            await self.commits(self.ledger.fail, request.key, outcome)
            self._refused += 1
            if self._refused >= self.config.refusal_limit:
                reason = (
                    f"the last {self._refused} requests were all refused; {outcome.detail}; mend this and run again"
                )
                await self.commits(self.ledger.stop, reason)
        else:
            await self._again(request, outcome, sent)

    async def _again(self, request: Claimed, outcome: Again, sent: float) -> None:
        now = time.monotonic()
        if outcome.busy:
            self.pace.pushed_back(sent, now)
        attempt, detail = request.tries + 1, outcome.detail
        if outcome.wait_s is not None and outcome.wait_s > self.config.longest_wait_s:
            detail = f"{detail}; asked to wait {outcome.wait_s:.0f} s, over longest_wait_s"
        elif attempt >= self.config.attempt_limit:
            detail = f"{detail}; gave up after {attempt} attempts"
        else:
            due = time.time() + _wait_s(self.config.backoff_s, self.config.longest_wait_s, attempt, outcome.wait_s)
            await self.commits(self.ledger.retry, request.key, detail, due, lost=outcome.lost)
            return
        failure = Failure(detail=detail, permanent=False, attempts=attempt)
        await self.commits(self.ledger.fail, request.key, failure, lost=outcome.lost)


def _wait_s(backoff_s: float, longest_s: float, attempt: int, asked_s: float | None) -> float:
    """Seconds before the next attempt: jittered, doubled each time, never less than the server asked for."""
    wait_s = min(backoff_s * 2 ** (attempt - 1), longest_s)
    if asked_s is not None:
        return asked_s + random.uniform(0, 0.25) * min(wait_s, 1.0)
    return wait_s * random.uniform(0.5, 1.0)


async def settle(teacher: Teacher, commits: Commits, key: str, raw: bytes) -> int:
    """Books the cost of an answer that is committed; returns the tokens it used."""
    usage = read_usage(raw)
    if usage is None:
        await commits(commits.ledger.settle, key, None, None)
        return 0
    tokens = usage.prompt_tokens + usage.output_tokens
    await commits(commits.ledger.settle, key, teacher.prices.nano(usage), tokens)
    return tokens
