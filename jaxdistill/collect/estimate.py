"""What a run would cost and take, before it is started: `--dry-run`."""

import dataclasses
import sqlite3
import weakref
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from jaxdistill.collect.calls import Call
from jaxdistill.collect.campaign import worst_case
from jaxdistill.collect.config import LEDGER, RunConfig
from jaxdistill.collect.prices import NANO
from jaxdistill.collect.sampling import Plan
from jaxdistill.collect.teacher import Teacher
from jaxdistill.records import Usage

_SHARE = 0.25  # of max_tokens that an answer is taken to use where this folder holds none to go by
_TOKENS_PER_S = 50.0  # of one answer, where this folder holds none to go by
_PROMPT_BYTES = 3.5  # of a prompt token


@dataclasses.dataclass(frozen=True)
class Judge:
    """A judge that may be asked about answers."""

    teacher: Teacher
    at_worst: Callable[[Call], Iterable[tuple[int, int]]]  # tokens of the questions that a first call may lead to


def estimate(teacher: Teacher, config: RunConfig, sampling: Plan, judge: Judge | None = None) -> str:
    """Requests, expected and worst-case cost, and time, as a table; every assumption is named.

    The worst case is that of all requests that may still be made: every answer as long as its limit allows, every
    larger try and every further sample, and with a judge a question about every answer.
    """
    ledger = _Known(config.workdir / LEDGER)
    sent: set[int] = set()
    answered = requests = prompt_bytes = most = 0
    worst, asked = [0, 0], [0, 0]  # billionths of a dollar, and tokens
    for call in sampling.start():
        again = _short(call.key) in sent  # problems of equal words are one request
        sent.add(_short(call.key))
        settled = ledger.settled(call.key)
        if not again:
            answered += settled
            requests += not settled
            prompt_bytes += 0 if settled else call.request.most_prompt_tokens - 128
        first, *further = sampling.at_worst(call)
        most += 1 + len(further)
        for tokens in [*([] if again or settled else [first]), *further]:
            _add(worst, worst_case(teacher, *tokens))
        if judge is not None:
            for tokens in judge.at_worst(call):
                _add(asked, worst_case(judge.teacher, *tokens))
    known, seconds = ledger.averages()
    prompt = prompt_bytes / _PROMPT_BYTES
    output = known - prompt / max(1, requests) if known else config.teacher.max_tokens * _SHARE  # of the sum it knows
    each = max(1, round(output))
    usage = Usage(prompt_tokens=round(prompt), output_tokens=each * requests)
    tokens = usage.prompt_tokens + usage.output_tokens
    time_s = requests * (seconds or each / _TOKENS_PER_S) / (config.teacher.in_flight * config.workers)
    basis = (
        f"{ledger.answers} answers in this folder: {each} output tokens, {seconds:.0f} s each"
        if known
        else f"{_SHARE:.0%} of max_tokens = {each} output tokens an answer, {_TOKENS_PER_S:.0f} tokens/s"
    )
    up_to = f", up to {most:,} in all" if most > requests + answered else ""
    rows = [
        ("requests to send", f"{requests:,}{up_to}"),
        ("already answered", f"{answered:,}"),
        ("price", teacher.prices.describe()),
        ("expected", f"${teacher.prices.nano(usage) / NANO:,.2f}, {tokens:,} tokens"),
        ("worst case", _cost(worst) + (" for all of these" if up_to else "")),
    ]
    if judge is not None:
        rows += [
            ("the judge's price", judge.teacher.prices.describe()),
            ("the judge's worst case", f"{_cost(asked)}, if it is asked about every answer"),
            ("worst case of both", _cost([one + other for one, other in zip(worst, asked, strict=True)])),
        ]
    rows += [
        ("time", f"{time_s / 3600:.1f} h with {config.teacher.in_flight * config.workers} under way"),
        ("assumed", basis),
    ]
    return "\n".join(f"{name:26} {value}" for name, value in rows)


class _Known:
    """What the ledger of a folder holds, if there is one; it is read and not changed."""

    def __init__(self, ledger: Path):
        self._database = sqlite3.connect(f"file:{ledger}?mode=ro", uri=True) if ledger.is_file() else None
        if self._database:
            weakref.finalize(self, self._database.close)
        self.answers = 0 if self._database is None else self._one("SELECT count(*) FROM responses")[0]

    def _one(self, query: str, *values: str) -> tuple[Any, ...]:
        return self._database.execute(query, values).fetchone() if self._database else (0, 0)

    def settled(self, key: str) -> bool:
        """Whether a request has an answer or a refusal."""
        return bool(self._one("SELECT count(*) FROM requests WHERE key = ? AND state IN ('done', 'refused')", key)[0])

    def averages(self) -> tuple[float, float]:
        """Tokens, prompt included, and seconds of the answers."""
        tokens, seconds = self._one("SELECT avg(tokens), avg(received - sent) FROM responses")
        return tokens or 0.0, seconds or 0.0


def _short(key: str) -> int:
    """Enough of a request's key to know it again: a long file has many."""
    return int(key[:15], 16)


def _add(sums: list[int], numbers: tuple[int, int]) -> None:
    sums[0] += numbers[0]
    sums[1] += numbers[1]


def _cost(sums: list[int]) -> str:
    return f"${sums[0] / NANO:,.2f}, {sums[1]:,} tokens"
