"""Who is let in: the key and the number of requests at once, before anything of a body is read."""

import dataclasses
import hashlib
import hmac

from starlette.datastructures import Headers
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from jaxdistill.errors import UserError
from jaxdistill.serve.metrics import Metrics
from jaxdistill.serve.schema import ApiError

_OPEN_TO_ALL = ("/health", "/openapi.json")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Limits:
    """What the server takes; what is more gets a 4xx."""

    body_bytes: int = 8 << 20  # of one request
    headers_s: float = 30.0  # seconds for a request's headers to arrive
    body_s: float = 30.0  # seconds for a request's body to arrive
    requests: int = 1024  # calls at once, the reading of their bodies included; more get a 429
    queue: int = 512  # samples that wait for a slot; calls that need more get a 429

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value, least = getattr(self, field.name), 0 if field.name == "queue" else 1
            if value < least:
                raise UserError(f"limits.{field.name} is {value}; expected {least} or more")


class Gate:
    """ASGI middleware: the key, the number of calls at once, and what is counted of each.

    Args:
      paths: whose calls are counted apart; those to any other are counted together.
    """

    def __init__(self, app: ASGIApp, paths: frozenset[str], limits: Limits, key: str, metrics: Metrics):
        self._app, self._paths, self._limits, self._metrics = app, paths, limits, metrics
        self._key = _digest(key) if key else None
        self._calls = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Lets a request through, or refuses it."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        path = scope["path"] if scope["path"] in self._paths else "other"

        async def counted(message: Message) -> None:
            if message["type"] == "http.response.start":
                self._metrics.requests.labels(path, message["status"]).inc()
            await send(message)

        if scope["path"] in _OPEN_TO_ALL:
            await self._app(scope, receive, counted)
            return
        if self._key and not hmac.compare_digest(_digest(_bearer(scope)), self._key):
            await _refuse(ApiError(401, "The API key is missing or wrong.", code="invalid_api_key"), counted, scope)
            return
        if self._calls >= self._limits.requests:
            await _refuse(ApiError(429, "Too many calls at once; try again later."), counted, scope)
            return
        self._calls += 1
        try:
            await self._app(scope, receive, counted)
        finally:
            self._calls -= 1


def _bearer(scope: Scope) -> str:
    kind, _, key = Headers(scope=scope).get("authorization", "").partition(" ")
    return key.strip() if kind.lower() == "bearer" else ""


def _digest(key: str) -> bytes:
    """Of equal length whatever the key, so that comparing takes the same time."""
    return hashlib.sha256(key.encode()).digest()


async def _refuse(error: ApiError, send: Send, scope: Scope) -> None:
    headers = {"retry-after": "1"} if error.status == 429 else {"www-authenticate": "Bearer"}

    async def nothing() -> Message:
        return {"type": "http.disconnect"}

    await JSONResponse(error.body, error.status, headers)(scope, nothing, send)
