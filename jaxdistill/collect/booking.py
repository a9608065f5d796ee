"""What becomes of an attempt in the ledger: an answer and its cost, another attempt later, a failure, or the end."""

import random
import time

from jaxdistill.collect.api import Again, Outcome, Stop
from jaxdistill.collect.commits import Commits
from jaxdistill.collect.reply import read_usage
from jaxdistill.collect.request import Failure, Response
from jaxdistill.collect.teacher import Teacher


class Booking:
    """Writes outcomes down, and stops the run when the requests of this process are refused one after another."""

    def __init__(self, teacher: Teacher, commits: Commits):
        self.teacher, self.config, self.commits, self.ledger = teacher, teacher.config, commits, commits.ledger
        self._refused = 0  # requests refused since the last answer

    async def book(self, key: str, tries: int, outcome: Outcome) -> int:
        """Books what came of an attempt after `tries` earlier ones; returns the tokens that an answer used."""
        if isinstance(outcome, Response):
            self._refused = 0
            await self.commits(self.ledger.answer, key, outcome)
            return await settle(self.teacher, self.commits, key, outcome.raw)
        if isinstance(outcome, Stop):
            self.commits(self.ledger.retry, key, outcome.reason, 0.0, lost=False, tried=False)
            await self.commits(self.ledger.stop, outcome.reason)
        elif isinstance(outcome, Failure):
            await self.commits(self.ledger.fail, key, outcome)
            self._refused += 1
            if self._refused >= self.config.refusal_limit:
                reason = f"the last {self._refused} requests were all refused: {outcome.detail}; mend this, run again"
                await self.commits(self.ledger.stop, reason)
        else:
            await self._again(key, tries + 1, outcome)
        return 0

    async def _again(self, key: str, attempt: int, outcome: Again) -> None:
        detail = outcome.detail
        if outcome.wait_s is not None and outcome.wait_s > self.config.longest_wait_s:
            detail = f"{detail}; asked to wait {outcome.wait_s:.0f} s, over longest_wait_s"
        elif attempt >= self.config.attempt_limit:
            detail = f"{detail}; gave up after {attempt} attempts"
        else:
            due = time.time() + wait_s(self.config.backoff_s, self.config.longest_wait_s, attempt, outcome.wait_s)
            await self.commits(self.ledger.retry, key, detail, due, lost=outcome.lost)
            return
        failure = Failure(detail=detail, permanent=False, attempts=attempt)
        await self.commits(self.ledger.fail, key, failure, lost=outcome.lost)


def wait_s(backoff_s: float, longest_s: float, attempt: int, asked_s: float | None) -> float:
    """Seconds before the next attempt: jittered, doubled each time, never less than the server asked for."""
    doubled_s = min(backoff_s * 2 ** (attempt - 1), longest_s)
    if asked_s is not None:
        return asked_s + random.uniform(0, 0.25) * min(doubled_s, 1.0)
    return doubled_s * random.uniform(0.5, 1.0)


async def settle(teacher: Teacher, commits: Commits, key: str, raw: bytes) -> int:
    """Books the cost of an answer that is committed; returns the tokens it used."""
    usage = read_usage(raw)
    if usage is None:
        await commits(commits.ledger.settle, key, None, None)
        return 0
    tokens = usage.prompt_tokens + usage.output_tokens
    await commits(commits.ledger.settle, key, teacher.prices.nano(usage), tokens)
    return tokens
