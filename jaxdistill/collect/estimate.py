"""What a run would cost and take, before it is started: `--dry-run`."""

import contextlib
import sqlite3
from pathlib import Path

from jaxdistill.collect.campaign import worst_case
from jaxdistill.collect.config import LEDGER, RunConfig
from jaxdistill.collect.prices import NANO
from jaxdistill.collect.sampling import Plan
from jaxdistill.collect.teacher import Teacher
from jaxdistill.records import Usage

_SHARE = 0.25  # of max_tokens that an answer is taken to use where this folder holds none to go by
_TOKENS_PER_S = 50.0  # of one answer, where this folder holds none to go by
_PROMPT_BYTES = 3.5  # of a prompt token


def estimate(teacher: Teacher, config: RunConfig, sampling: Plan) -> str:
    """Requests, expected and worst-case cost, and time, as a table; every assumption is named."""
    answered, known, seconds = _known(config.workdir / LEDGER)
    calls = sampling.start()
    requests = {call.key: call.request for call in calls if call.key not in answered}
    factor = sampling.most / max(1, len(calls))  # where samples are asked for only as long as they are needed
    worst = [worst_case(teacher, request) for request in requests.values()]
    limit = config.teacher.max_tokens
    prompt = sum(request.most_prompt_tokens - 128 for request in requests.values()) / _PROMPT_BYTES
    output = known - prompt / max(1, len(requests)) if known else limit * _SHARE  # the ledger knows the sum
    each = max(1, round(output))
    usage = Usage(prompt_tokens=round(prompt), output_tokens=each * len(requests))
    tokens = usage.prompt_tokens + usage.output_tokens
    time_s = len(requests) * (seconds or each / _TOKENS_PER_S) / (config.teacher.in_flight * config.workers)
    basis = (
        f"{len(answered)} answers in this folder: {each} output tokens, {seconds:.0f} s each"
        if known
        else f"{_SHARE:.0%} of max_tokens = {each} output tokens an answer, {_TOKENS_PER_S:.0f} tokens/s"
    )
    rows = [
        ("requests to send", f"{len(requests):,}" + (f", up to {sampling.most:,} in all" if factor > 1 else "")),
        ("already answered", f"{len(answered):,}"),
        ("price", teacher.prices.describe()),
        (
            "expected",
            f"${teacher.prices.nano(usage) / NANO:,.2f}, {tokens:,} tokens",
        ),
        ("worst case", f"${sum(n for n, _ in worst) / NANO:,.2f}, {sum(t for _, t in worst):,} tokens"),
        ("time", f"{time_s / 3600:.1f} h with {config.teacher.in_flight * config.workers} under way"),
        ("assumed", basis),
    ]
    if factor > 1:
        rows.append(("if all samples are needed", f"times {factor:.1f}"))
    if config.teacher.larger_max_tokens:
        rows.append(("each answer cut off", f"one more request of up to {config.teacher.larger_max_tokens:,} tokens"))
    return "\n".join(f"{name:26} {value}" for name, value in rows)


def _known(ledger: Path) -> tuple[set[str], float, float]:
    """Keys that have an answer, and the averages of their tokens, prompt included, and seconds."""
    if not ledger.is_file():
        return set(), 0.0, 0.0
    with contextlib.closing(sqlite3.connect(f"file:{ledger}?mode=ro", uri=True)) as database:
        keys = {key for (key,) in database.execute("SELECT key FROM requests WHERE state IN ('done', 'refused')")}
        tokens, seconds = database.execute("SELECT avg(tokens), avg(received - sent) FROM responses").fetchone()
    return keys, tokens or 0.0, seconds or 0.0
