"""The ledger: content addresses, raw bytes, what is asked again, budgets to the last billionth, who may hold it."""

import asyncio
import contextlib
import dataclasses
import errno
import json
import sqlite3
from pathlib import Path

import pytest

from jaxdistill.collect.commits import Commits
from jaxdistill.collect.ledger import Ledger
from jaxdistill.collect.request import Failure, Request, Response
from jaxdistill.collect.teacher import Teacher, TeacherConfig
from jaxdistill.errors import UserError

TEACHER = TeacherConfig(base_url="http://127.0.0.1:9/v1")
MESSAGES = ({"role": "user", "content": "What is 2 + 2?"},)


def request_of(sample_index: int = 0, prompt: str = "", **changes: object) -> Request:
    return Teacher(dataclasses.replace(TEACHER, **changes)).request(MESSAGES, sample_index, prompt)  # type: ignore[arg-type]


def planned(count: int, nano: int = 10, tokens: int = 7) -> list[tuple[Request, int, int]]:
    return [(request_of(i), nano, tokens) for i in range(count)]


def answer(raw: bytes = b"\xff\x00 raw") -> Response:
    return Response(raw=raw, request_id="req_1", sent=4.0, received=5.0)


def keys(ledger: Ledger, count: int = 100, now: float = 0.0) -> list[str]:
    return [claimed.key for claimed in ledger.claim(count, now)]


def test_requests_are_addressed_by_their_content():
    request = request_of()
    others = [
        request_of(model="other"),
        request_of(temperature=0.5),
        request_of(extra={"top_k": 3}),
        request_of(reasoning_effort="high"),
        Teacher(TEACHER).request(({"role": "user", "content": "What is 2 + 3?"},)),
        request_of(prompt="long_thought.v1@ab"),
        request_of(prompt="long_thought.v1@cd"),
        request_of(sample_index=1),
    ]
    assert len({request.key, *(other.key for other in others)}) == 9
    assert others[-1].prompt_hash == request.prompt_hash != others[-2].prompt_hash
    assert request_of(in_flight=1, attempt_limit=2).key == request.key
    assert request.body == {"model": "local-teacher", "messages": [dict(MESSAGES[0])], "max_completion_tokens": 32_768}
    assert request.key == "b3829e61c58749e8333566aad0f4cd7c42cb0635cb3c18cb16610ddec1e5ad4f"  # ledgers on disk hold it


def test_the_ledger_keeps_raw_bytes_and_asks_only_for_what_is_open(tmp_path: Path):
    plan = planned(5)
    names = [request.key for request, _, _ in plan]
    with Ledger(tmp_path / "run" / "ledger.sqlite") as ledger:
        ledger.begin()
        ledger.record(plan)
        ledger.record(plan)
        assert keys(ledger, 4) == names[:4]
        ledger.answer(names[0], answer())
        ledger.settle(names[0], 3, 2)
        ledger.fail(names[1], Failure(detail="HTTP 400: no", permanent=True))
        ledger.fail(names[2], Failure(detail="HTTP 500: oh", permanent=False))
        assert keys(ledger) == names[4:]
        assert keys(ledger) == []
        assert [key for _, key in ledger.outcomes(0)] == names[:3]
        assert ledger.outcomes(2) == [(3, names[2])]
        with pytest.raises(KeyError):
            ledger.result("unknown")
    with Ledger(tmp_path / "run" / "ledger.sqlite") as ledger:
        ledger.begin()
        assert keys(ledger) == []  # nothing is sent that this run did not ask for
        ledger.record(plan[:4])
        assert keys(ledger) == names[2:4]
        assert ledger.settled(names) == set(names[:2])
        assert ledger.result(names[0]) == dataclasses.replace(answer(), nano=3)
        assert ledger.result(names[1]) == Failure(detail="HTTP 400: no", permanent=True, attempts=1)
        assert ledger.result(names[4]) == Failure(
            detail="the run ended before the answer came", permanent=False, attempts=0
        )
        with pytest.raises(sqlite3.IntegrityError):  # an answer is never overwritten
            ledger.answer(names[0], answer(b""))


def test_retries_come_before_new_requests_once_they_are_due(tmp_path: Path):
    plan = planned(6)
    names = [request.key for request, _, _ in plan]
    with Ledger(tmp_path / "ledger.sqlite") as ledger:
        ledger.begin()
        ledger.record(plan)
        assert keys(ledger, 2, now=100.0) == names[:2]
        ledger.retry(names[0], "busy", 110.0, lost=False)
        ledger.retry(names[1], "busy", 105.0, lost=False)
        assert keys(ledger, 2, now=101.0) == names[2:4]
        assert keys(ledger, 3, now=120.0) == [names[1], names[0], names[4]]
        ledger.stop("the key is refused")
        ledger.stop("another reason")
        assert keys(ledger) == []
        assert ledger.standing().account.stop == "the key is refused"


def test_a_budget_is_never_passed(tmp_path: Path):
    """Worst case out + spent + what may have been lost stays within the budget, to the unit."""
    plan = planned(20, nano=10, tokens=7)
    names = [request.key for request, _, _ in plan]
    with Ledger(tmp_path / "ledger.sqlite") as ledger:
        ledger.begin(budget_nano=40)
        ledger.record(plan)
        assert keys(ledger) == names[:4]
        assert not ledger.standing().fits
        ledger.answer(names[0], answer())
        assert keys(ledger) == []  # until it was read it counts at its worst
        ledger.settle(names[0], 3, 2)
        assert keys(ledger) == []  # 3 spent, 30 out, 10 would be too many
        ledger.answer(names[1], answer())
        ledger.settle(names[1], 7, 2)
        assert keys(ledger) == names[4:5]
        ledger.retry(names[2], "timed out", 1.0, lost=True)
        assert keys(ledger, now=2.0) == []
        ledger.fail(names[3], Failure(detail="HTTP 500", permanent=False))
        account = ledger.standing().account
        assert (account.spent_nano, account.reserved_nano, account.lost_nano) == (10, 10, 10)
        assert keys(ledger, now=2.0) == [names[2]]
    with Ledger(tmp_path / "ledger.sqlite") as ledger:  # killed with two out: they may have been paid for
        ledger.begin(budget_nano=50)
        account = ledger.account()
        assert (account.spent_nano, account.reserved_nano, account.lost_nano) == (10, 0, 30)
        ledger.record(plan)
        assert len(keys(ledger)) == 1
    with Ledger(tmp_path / "ledger.sqlite") as ledger:
        ledger.begin(budget_tokens=4 + 4 * 7 + 20)
        ledger.record(plan)
        assert len(keys(ledger)) == 2
        assert not ledger.standing().fits
        ledger.answer(names[2], answer())
        ledger.settle(names[2], None, None)  # an answer that does not say what it used counts at its worst
        assert ledger.account().spent_tokens == 4 + 7


def test_what_a_server_works_on_is_asked_for_by_its_id_and_stays_reserved(tmp_path: Path):
    plan = planned(3)
    names = [request.key for request, _, _ in plan]
    with Ledger(tmp_path / "ledger.sqlite") as ledger:
        ledger.begin()
        ledger.record(plan)
        assert keys(ledger, 2) == names[:2]
        ledger.accepted(names[1], "resp_7")
    with Ledger(tmp_path / "ledger.sqlite") as ledger:
        ledger.begin(budget_nano=20)
        assert (ledger.account().lost_nano, ledger.account().reserved_nano) == (10, 10)
        ledger.record(plan)
        claimed = ledger.claim(5, 2.0)
        assert [(c.key, c.remote) for c in claimed] == [(names[1], "resp_7")]
        assert ledger.account().reserved_nano == 10
        ledger.answer(names[1], answer())
    with Ledger(tmp_path / "ledger.sqlite") as ledger:
        ledger.begin()
        assert [key for key, _ in ledger.unsettled()] == [names[1]]
        assert ledger.account().reserved_nano == 10
        ledger.settle(names[1], 4, 4)
        assert (ledger.account().spent_nano, ledger.account().reserved_nano) == (4, 0)


def test_calls_that_come_together_share_a_commit_and_fail_together(tmp_path: Path):
    plan = planned(50)

    async def run(ledger: Ledger) -> int:
        async with Commits(ledger) as commits:
            await commits(ledger.record, plan)
            await commits(ledger.claim, 50, 0.0)
            before = ledger.database.total_changes
            await asyncio.gather(*(commits(ledger.answer, request.key, answer()) for request, _, _ in plan))
            with pytest.raises(sqlite3.IntegrityError):
                await commits(ledger.answer, plan[0][0].key, answer())
            return ledger.database.total_changes - before

    with Ledger(tmp_path / "ledger.sqlite") as ledger:
        ledger.begin()
        assert asyncio.run(run(ledger)) >= 100
        assert len(ledger.unsettled()) == 50


def test_half_a_surrogate_pair_is_recorded(tmp_path: Path):
    request = Teacher(TEACHER).request(({"role": "user", "content": "half an emoji: \ud83d, and é"},))
    with Ledger(tmp_path / "ledger.sqlite") as ledger:
        ledger.begin()
        ledger.record([(request, 1, 1)])
    with contextlib.closing(sqlite3.connect(tmp_path / "ledger.sqlite")) as database:
        (body,) = database.execute("SELECT body FROM requests").fetchone()
    assert json.loads(body) == request.body


def test_a_full_disk_is_told_from_a_broken_ledger(tmp_path: Path):
    ((request, *_),) = plan = planned(1)
    with Ledger(tmp_path / "ledger.sqlite") as ledger:
        ledger.begin()
        ledger.record(plan)
        (pages,) = ledger.database.execute("PRAGMA page_count").fetchone()
        ledger.database.execute(f"PRAGMA max_page_count = {pages}")
        assert keys(ledger) == [request.key]
        with pytest.raises(OSError, match=r"ledger\.sqlite") as caught:
            ledger.answer(request.key, answer(b"x" * 100_000))
        assert caught.value.errno == errno.ENOSPC
        assert ledger.standing().out == 1


def test_one_command_at_a_time_holds_a_ledger_and_its_workers_join(tmp_path: Path):
    path = tmp_path / "ledger.sqlite"
    with Ledger(path), Ledger(path, joins=True), pytest.raises(UserError, match="in use by another process"):
        Ledger(path)
    with Ledger(path) as ledger:
        assert ledger.settled(["a"]) == set()


def test_a_file_that_is_no_ledger_is_refused(tmp_path: Path):
    path = tmp_path / "ledger.sqlite"
    path.write_bytes(b"not a database" * 100)
    with pytest.raises(UserError, match="not a usable ledger"):
        Ledger(path)
    assert path.read_bytes() == b"not a database" * 100
    path.unlink()
    with contextlib.closing(sqlite3.connect(path)) as database:
        database.execute("CREATE TABLE requests (key TEXT)")
    with pytest.raises(UserError, match=r"another version of jaxdistill \(format 0, this one reads 2\)"):
        Ledger(path)
