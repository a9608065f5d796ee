"""The teacher's rate limits, told in OpenAI's headers and, if asked for, enforced."""

import time


class Limit:
    """A bucket that refills evenly; `name` is requests or tokens."""

    def __init__(self, name: str, limit: int, period_s: float):
        self.name, self.limit, self.per_s = name, limit, limit / period_s
        self._level, self._seen = float(limit), time.monotonic()

    def take(self, amount: float, enforced: bool) -> bool:
        """Counts a request; false if it is one too many, which is then not counted."""
        now = time.monotonic()
        self._level, self._seen = min(float(self.limit), self._level + (now - self._seen) * self.per_s), now
        if enforced and self._level < amount:
            return False
        self._level = max(0.0, self._level - amount)
        return True

    def headers(self) -> dict[str, str]:
        """What a response says about it."""
        return {
            f"x-ratelimit-limit-{self.name}": str(self.limit),
            f"x-ratelimit-remaining-{self.name}": str(int(self._level)),
            f"x-ratelimit-reset-{self.name}": f"{(self.limit - self._level) / self.per_s:.3f}s",
        }
