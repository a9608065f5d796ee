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
from jaxdistill.collect.request import Failure, Response
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
_PLANNED = 500  # calls recorded at a time
_WINDOW_BYTES, _BATCH_WINDOW_BYTES = 64 << 20, 512 << 20  # of calls that wait for an answer, about, in memory
_CALL_BYTES = 3000  # of a call beside its texts
_AHEAD = 4  # calls that wait, at least, for each that may be under way


class Campaign:
    """One run. `ended` says afterwards why it ended early, None if every call has its outcome."""

    def __init__(self, teacher: Teacher, ledger: Ledger, sampling: Plan, config: RunConfig, verifier: Verifier):
        self.teacher, self.ledger, self.sampling = teacher, ledger, sampling
        self.config, self.verifier = config, verifier
        self.ended: str | None = None
        self._calls: Iterator[Call] = iter(())  # those that are still to be planned
        self._more = True  # whether there are any
        self._waiting: dict[str, list[Call]] = {}
        self._waiting_bytes = 0
        self._total = sampling.starts

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
            self._calls = iter(self.sampling.start())
            while await self._refill(commits, shown):
                pass
            if not self._waiting:
                return
            spare.hold(path, self._under_way, self.teacher.config.larger_max_tokens or self.teacher.config.max_tokens)
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
        while (self._waiting or self._more) and not sending.done():
            check()
            news = await commits(self.ledger.outcomes, seen)
            calls = [call for _, key in news for call in self._waiting.pop(key, [])]
            if news:
                seen = news[-1][0]
                self._waiting_bytes -= sum(map(_size, calls))
                await self._plan(await self._judge(calls, commits, shown, earlier=False), commits, shown)
            refilled = await self._refill(commits, shown)
            standing = await commits(self.ledger.standing)
            shown.show(standing.account, self._total, standing.trouble)
            if news or refilled or standing.out or (standing.in_batches and not standing.account.stop):
                await asyncio.sleep(0 if (refilled and self._room) or len(news) > 100 else _TICK_S)
                continue
            if standing.account.stop or not standing.fits:
                if await commits(self.ledger.outcomes, seen):
                    continue
                self.ended = standing.account.stop or OVER_BUDGET
                while await self._refill(commits, shown):  # what was answered before is a result all the same
                    pass
                return
            await asyncio.sleep(_TICK_S)

    @property
    def _under_way(self) -> int:
        return self.config.workers * self.teacher.config.in_flight

    @property
    def _room(self) -> bool:
        """Whether further calls are to be planned: those that wait are held in memory."""
        window = _BATCH_WINDOW_BYTES if self.teacher.in_batches else _WINDOW_BYTES
        few = len(self._waiting) < _AHEAD * self._under_way
        return self._more and (few or self._waiting_bytes < window or self.ended is not None)

    async def _refill(self, commits: Commits, shown: Board) -> int:
        """Plans some of the calls that are still to be planned, where there is room for them; returns how many."""
        if not self._room:
            return 0
        calls = await asyncio.to_thread(self._pull)  # sending goes on meanwhile
        self._more = bool(calls)
        await self._plan(calls, commits, shown)
        return len(calls)

    def _pull(self) -> list[Call]:
        calls: list[Call] = []
        size = 0
        while len(calls) < _PLANNED and size < _WINDOW_BYTES // 8 and (call := next(self._calls, None)):
            calls.append(call)
            size += _size(call)
        return calls

    async def _plan(self, calls: list[Call], commits: Commits, shown: Board) -> None:
        """Records calls to be sent, unless the run has ended.

        Those whose answer is there are judged at once, which may lead to further ones.
        """
        while calls:
            settled = await commits(self.ledger.settled, [call.key for call in calls])
            new = [call for call in calls if call.key not in settled and self.ended is None]
            if new:
                requests = {call.key: call.request for call in new}
                await commits(
                    self.ledger.record,
                    [(r, *worst_case(self.teacher, r.most_prompt_tokens, r.max_tokens)) for r in requests.values()],
                )
            for call in new:
                self._waiting.setdefault(call.key, []).append(call)
                self._waiting_bytes += _size(call)
            calls = await self._judge([c for c in calls if c.key in settled], commits, shown, earlier=True)

    async def _judge(self, calls: list[Call], commits: Commits, shown: Board, *, earlier: bool) -> list[Call]:
        """Judges calls that have an outcome; returns those to make because of it."""
        further: list[Call] = []
        for start in range(0, len(calls), _GROUP):
            group = calls[start : start + _GROUP]
            outcomes = await commits(lambda group=group: [self.ledger.result(call.key) for call in group])
            results = await asyncio.to_thread(self._judge_all, group, outcomes)  # sending goes on meanwhile
            for call, judged in zip(group, results, strict=True):
                ended, calls_of_it = self.sampling.judged(call, judged)
                further += calls_of_it
                self._total += len(calls_of_it) - (not ended)  # a larger try takes its place
                if ended:
                    shown.judged(judged, earlier=earlier)
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


def _size(call: Call) -> int:
    """Bytes of memory, about."""
    texts = (call.problem.problem, call.problem.solution or "")
    return _CALL_BYTES + call.request.most_prompt_tokens + sum(map(len, texts))


def worst_case(teacher: Teacher, prompt_tokens: int, output_tokens: int) -> tuple[int, int]:
    """What one attempt with so many tokens at most can cost: billionths of a dollar, and tokens."""
    prompt = -(-prompt_tokens // 256) * 256  # rounded up, so that the price is looked up a few times only
    usage = Usage(prompt_tokens=prompt, output_tokens=output_tokens)
    return teacher.prices.nano(usage), prompt + output_tokens


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
