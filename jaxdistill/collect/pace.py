"""How many requests may be under way: additive increase, multiplicative decrease, and the buckets of rate limits."""

import math
import re
from collections.abc import Mapping

_START = 16  # requests under way at first; doubled each round trip until the server first pushes back
_DECREASE = 0.5
_UNITS_S = {"ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}


class Bucket:
    """What a rate limit leaves: `level` refills at `limit` per `period_s`; unlimited until a server names a limit."""

    def __init__(self) -> None:
        self.limit, self.level, self.per_s, self._seen_s = math.inf, math.inf, 0.0, 0.0

    def refill(self, now: float) -> float:
        """The level now."""
        if self.limit < math.inf:
            self.level = min(self.limit, self.level + (now - self._seen_s) * self.per_s)
        self._seen_s = now
        return self.level

    def take(self, amount: float) -> None:
        """Counts what was sent."""
        self.level -= amount

    def told(self, limit: float, remaining: float, reset_s: float | None, now: float) -> None:
        """Reads the headers of a response: they lag behind what was sent since, so they only ever lower the level."""
        self.refill(now)
        missing = limit - remaining
        self.per_s = missing / reset_s if reset_s and missing > 0 else limit / 60.0
        self.limit, self.level = limit, min(self.level, remaining)

    def wait_s(self, amount: float) -> float:
        """Seconds until `amount` is there; no more than a full bucket is waited for."""
        missing = min(amount, self.limit) - self.level
        return max(0.0, missing / self.per_s) if missing > 0 and self.per_s else 0.0


class Pace:
    """Decides how many more requests may be sent now. All times are of one monotonic clock, in seconds."""

    def __init__(self, most: int):
        self.most = most
        self.limit = float(min(most, _START))
        self.in_flight = 0
        self.requests, self.tokens = Bucket(), Bucket()
        self._tokens_each = 0.0  # average of the answers so far
        self._probing = True  # no server has pushed back yet
        self._decreased = -math.inf

    def room(self, now: float) -> int:
        """Requests that may be sent now."""
        room = math.floor(self.limit) - self.in_flight
        room = min(room, self.requests.refill(now))
        tokens = self.tokens.refill(now)
        if self._tokens_each and tokens < math.inf:
            room = min(room, tokens / self._tokens_each)
        return max(0, math.floor(room))

    def wait_s(self) -> float:
        """Seconds until a rate limit lets one more through; 0 where none is in the way."""
        return max(self.requests.wait_s(1.0), self.tokens.wait_s(self._tokens_each))

    def sent(self, count: int) -> None:
        """Counts requests that are under way from now on."""
        self.in_flight += count
        self.requests.take(float(count))
        self.tokens.take(count * self._tokens_each)

    def ended(self) -> None:
        """One request is not under way any more."""
        self.in_flight -= 1

    def answered(self, tokens: int) -> None:
        """A success: one more at a time for each while probing, later one more for each round trip."""
        self.limit = min(float(self.most), self.limit + (1.0 if self._probing else 1.0 / self.limit))
        if tokens:
            self._tokens_each += (tokens - self._tokens_each) * (0.05 if self._tokens_each else 1.0)

    def pushed_back(self, sent: float, now: float) -> None:
        """The server was too busy for a request; those sent before the last decrease do not count again."""
        self._probing = False
        if sent >= self._decreased:
            self.limit, self._decreased = max(1.0, min(self.limit, self.in_flight + 1) * _DECREASE), now

    def told(self, headers: Mapping[str, str], now: float) -> None:
        """Reads the `x-ratelimit-*` headers of a response."""
        for name, bucket in (("requests", self.requests), ("tokens", self.tokens)):
            try:
                limit = float(headers[f"x-ratelimit-limit-{name}"])
                remaining = float(headers[f"x-ratelimit-remaining-{name}"])
            except (KeyError, ValueError):
                continue
            if limit > 0 and remaining >= 0:
                bucket.told(limit, remaining, duration_s(headers.get(f"x-ratelimit-reset-{name}", "")), now)


def duration_s(text: str) -> float | None:
    """Seconds of a duration such as 6m0s, 1.5s, 20ms or 12; None if it is none."""
    if re.fullmatch(r"\d+(\.\d+)?", text):
        return float(text)
    parts = re.findall(r"(\d+(?:\.\d+)?)(ms|[smhd])", text)
    if not parts or "".join(number + unit for number, unit in parts) != text:
        return None
    return sum(float(number) * _UNITS_S[unit] for number, unit in parts)
