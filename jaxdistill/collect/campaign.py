"""One run over a ledger: plans calls, has them sent by this process and its workers, judges answers as they come."""

import asyncio
import contextlib
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

from jaxdistill.collect import batch_ledger, spare, worker
from jaxdistill.collect.batch import BatchSender
from jaxdistill.collect.board import Board, board
from jaxdistill.collect.booking import settle
from jaxdistill.collect.calls import Call, Judged
from jaxdistill.collect.commits import Commits
from jaxdistill.collect.config import LEDGER, RunConfig
from jaxdistill.collect.ledger import Account, Ledger
from jaxdistill.collect.prices import NANO
from jaxdistill.collect.request import Failure, Request, Response
from jaxdistill.collect.sampling import Plan
from jaxdistill.collect.sender import Sender
from jaxdistill.collect.teacher import Teacher
from jaxdistill.errors import RunError
from jaxdistill.manifest import write_config
from jaxdistill.records import Usage
from jaxdistill.verify import Verifier

INTERRUPTED = "interrupted"
OVER_BUDGET = "over budget"
_TICK_S = 0.1  # seconds between two looks for outcomes
_GROUP = 100  # answers judged at a time


class Campaign:
    """One run. `ended` says afterwards why it ended early, None if every call has its outcome."""

    def __init__(self, teacher: Teacher, ledger: Ledger, sampling: Plan, config: RunConfig, verifier: Verifier):
        self.teacher, self.ledger, self.sampling = teacher, ledger, sampling
        self.config, self.verifier = config, verifier
        self.ended: str | None = None
        self._settled: set[str] = set()
        self._waiting: dict[str, list[Call]] = {}
        self._total = 0

    def run(self, title: str, path: Path) -> Account:
        """Runs it to its end and returns what it cost; `path` is the ledger's.

        Raises:
          KeyboardInterrupt: a second Ctrl-C; all that was answered is in the ledger.
          OSError: the disk is full.
        """
        budget = self.config.budget_usd
        self.ledger.begin(None if budget is None else round(budget * NANO), self.config.budget_tokens)
        with board(title) as shown:
            try:
                asyncio.run(self._run(shown, path))
            except asyncio.CancelledError:
                raise KeyboardInterrupt from None
            finally:
                spare.release(path)
        return self.ledger.account()

    async def _run(self, shown: Board, path: Path) -> None:
        async with Commits(self.ledger) as commits, contextlib.AsyncExitStack() as stack:
            for key, raw in await commits(self.ledger.unsettled):
                await settle(self.teacher, commits, key, raw)
            self._settled = await commits(self.ledger.settled)
            await self._plan(self.sampling.start(), commits, shown)
            if not self._waiting:
                return
            under_way = self.config.workers * self.teacher.config.in_flight
            spare.hold(path, under_way, self.teacher.config.larger_max_tokens or self.teacher.config.max_tokens)
            over = asyncio.Event()
            with interruptible(lambda: asyncio.ensure_future(commits(self.ledger.stop, INTERRUPTED))):
                count = self.config.workers - 1 if not self.teacher.in_batches else 0
                check = await stack.enter_async_context(worker.workers(count, self.teacher.config, path))
                sending = asyncio.create_task(self._send(commits, over.is_set, path.parent / "batches"))
                try:
                    await self._watch(commits, shown, sending, check)
                except asyncio.CancelledError:  # a second Ctrl-C
                    sending.cancel()
                    raise
                finally:
                    over.set()
                    await asyncio.gather(sending, return_exceptions=True)
                sending.result()

    async def _send(self, commits: Commits, ended: Callable[[], bool], folder: Path) -> None:
        """Sends what is open, and fetches the batches of earlier runs."""
        senders: list[Sender | BatchSender] = []
        if not self.teacher.in_batches:
            senders.append(Sender(self.teacher, commits, ended))
        if self.teacher.in_batches or await commits(batch_ledger.unfinished, self.ledger):
            senders.append(BatchSender(self.teacher, commits, ended, folder))
        try:
            async with asyncio.TaskGroup() as tasks:
                for sender in senders:
                    tasks.create_task(sender.run())
        except* (RunError, OSError) as errors:  # OSError: the ledger's disk is full
            raise errors.exceptions[0] from None

    async def _watch(
        self, commits: Commits, shown: Board, sending: "asyncio.Task[None]", check: Callable[[], None]
    ) -> None:
        """Judges outcomes as they come, until there is none left to wait for."""
        seen = 0
        while self._waiting and not sending.done():
            check()
            news = await commits(self.ledger.outcomes, seen)
            calls = [call for _, key in news for call in self._waiting.pop(key, [])]
            if news:
                seen = news[-1][0]
                self._settled.update(key for _, key in news)
                await self._plan(await self._judge(calls, commits, shown, earlier=False), commits, shown)
            standing = await commits(self.ledger.standing)
            shown.show(standing.account, self._total, standing.trouble)
            if news or standing.out or (standing.in_batches and not standing.account.stop):
                await asyncio.sleep(0 if len(news) > 100 else _TICK_S)
                continue
            if standing.account.stop or not standing.fits:
                if await commits(self.ledger.outcomes, seen):
                    continue
                self.ended = standing.account.stop or OVER_BUDGET
                return
            await asyncio.sleep(_TICK_S)

    async def _plan(self, calls: list[Call], commits: Commits, shown: Board) -> None:
        """Records calls to be sent; those whose answer is there are judged at once, which may lead to further ones."""
        while calls:
            self._total += len(calls)
            new = {call.key: call.request for call in calls if call.key not in self._settled}
            if new:
                await commits(self.ledger.record, [(r, *worst_case(self.teacher, r)) for r in new.values()])
            for call in calls:
                if call.key in new:
                    self._waiting.setdefault(call.key, []).append(call)
            calls = await self._judge([c for c in calls if c.key in self._settled], commits, shown, earlier=True)

    async def _judge(self, calls: list[Call], commits: Commits, shown: Board, *, earlier: bool) -> list[Call]:
        """Judges calls that have an outcome; returns those to make because of it."""
        further: list[Call] = []
        for start in range(0, len(calls), _GROUP):
            group = calls[start : start + _GROUP]
            outcomes = await commits(lambda group=group: [self.ledger.result(call.key) for call in group])
            results = await asyncio.to_thread(self._judge_all, group, outcomes)  # sending goes on meanwhile
            for call, judged in zip(group, results, strict=True):
                further += self.sampling.judged(call, judged)
                if call.id in self.sampling.results:
                    shown.judged(judged, earlier=earlier)
                else:
                    self._total -= 1  # a larger try takes its place
        return further

    def _judge_all(self, calls: list[Call], outcomes: list[Response | Failure]) -> list[Judged]:
        return [
            self.sampling.judge(call, outcome, self.verifier) for call, outcome in zip(calls, outcomes, strict=True)
        ]


@contextlib.contextmanager
def answered(
    title: str, teacher: Teacher, sampling: Plan, config: RunConfig
) -> Iterator[tuple[Ledger, Account, str | None]]:
    """Runs a command's campaign: its ledger, still open, what it cost, and why it ended early if it did.

    Raises as `Campaign.run`.
    """
    write_config(config.workdir, config)
    path = config.workdir / LEDGER
    with Ledger(path) as ledger, Verifier(timeout_s=config.verify_timeout_s) as verifier:
        campaign = Campaign(teacher, ledger, sampling, config, verifier)
        account = campaign.run(title, path)
        yield ledger, account, campaign.ended


def worst_case(teacher: Teacher, request: Request) -> tuple[int, int]:
    """Most that one attempt can cost: billionths of a dollar, and tokens."""
    prompt = -(-request.most_prompt_tokens // 256) * 256  # rounded up, so that the price is looked up a few times only
    usage = Usage(prompt_tokens=prompt, output_tokens=request.max_tokens)
    return teacher.prices.nano(usage), prompt + request.max_tokens


@contextlib.contextmanager
def interruptible(first: Callable[[], object]) -> Iterator[None]:
    """Ctrl-C calls `first`, a second one cancels the task that runs this block."""
    loop, task = asyncio.get_running_loop(), asyncio.current_task()
    assert task
    presses = 0

    def pressed() -> None:
        nonlocal presses
        presses += 1
        first() if presses == 1 else task.cancel()

    try:
        loop.add_signal_handler(signal.SIGINT, pressed)
    except (ValueError, NotImplementedError, RuntimeError):  # not the main thread: nobody presses here
        yield
        return
    try:
        yield
    finally:
        loop.remove_signal_handler(signal.SIGINT)
