"""The pace of requests: how it grows, gives way, and follows the limits that a server tells."""

import pytest

from jaxdistill.collect.pace import Pace, duration_s


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("6m0s", 360.0), ("1.5s", 1.5), ("20ms", 0.02), ("1h2m3s", 3723.0), ("12", 12.0), ("soon", None), ("", None)],
)
def test_durations_are_read(text: str, seconds: float | None):
    assert duration_s(text) == pytest.approx(seconds)


def answer_all(pace: Pace) -> None:
    """One round trip: as many as there is room for are sent and answered."""
    room = pace.room(0.0)
    pace.sent(room)
    for _ in range(room):
        pace.ended()
        pace.answered(0)


def test_it_doubles_each_round_trip_until_the_server_pushes_back_then_adds_one():
    pace = Pace(most=100)
    assert pace.room(0.0) == 16
    answer_all(pace)
    assert pace.room(0.0) == 32
    pace.sent(32)
    for _ in range(32):
        pace.ended()
    pace.in_flight = 31
    pace.pushed_back(sent=1.0, now=2.0)
    assert pace.limit == 16
    pace.pushed_back(sent=1.5, now=3.0)  # sent before the pace gave way: the same congestion
    assert pace.limit == 16
    pace.in_flight = 0
    answer_all(pace)
    assert 16.9 < pace.limit < 17.1
    pace.pushed_back(sent=4.0, now=5.0)
    for step in range(20):
        pace.pushed_back(sent=6.0 + step, now=6.0 + step)
    assert pace.room(0.0) == 1  # never to a standstill
    for _ in range(10_000):
        pace.answered(0)
    assert pace.limit == 100


def headers(kind: str, limit: int, remaining: int, reset: str) -> dict[str, str]:
    names = (f"x-ratelimit-limit-{kind}", f"x-ratelimit-remaining-{kind}", f"x-ratelimit-reset-{kind}")
    return dict(zip(names, (str(limit), str(remaining), reset), strict=True))


def test_no_more_is_sent_than_a_limit_on_requests_leaves():
    pace = Pace(most=100)
    pace.told(headers("requests", 60, 3, "57s"), now=0.0)  # one a second
    assert pace.room(0.0) == 3
    pace.sent(3)
    assert pace.room(0.5) == 0
    assert pace.wait_s() == pytest.approx(0.5)
    assert pace.room(2.5) == 2
    pace.told(headers("requests", 60, 40, "20s"), now=2.5)  # says what was before the last ones were sent
    assert pace.room(2.5) == 2


def test_no_more_is_sent_than_a_limit_on_tokens_leaves():
    pace = Pace(most=100)
    pace.answered(100)
    pace.told(headers("tokens", 6000, 450, "55.5s"), now=0.0)  # 100 a second
    assert pace.room(0.0) == 4
    pace.sent(4)
    assert pace.room(0.0) == 0
    assert pace.wait_s() == pytest.approx(0.5)
    assert pace.room(1.0) == 1


def test_headers_that_say_nothing_change_nothing():
    pace = Pace(most=100)
    for wrong in ({}, headers("requests", 0, 0, ""), {"x-ratelimit-limit-requests": "many"}):
        pace.told(wrong, now=0.0)
    assert pace.room(0.0) == 16
