"""Raw HTTP to an OpenAI-compatible API, and what each of its errors means: try again, give up, or end the run."""

import contextlib
import dataclasses
import email.utils
import itertools
import json
import time
from collections.abc import AsyncIterator, Mapping
from typing import Any

import httpx2

from jaxdistill.collect.request import Failure, Response
from jaxdistill.collect.teacher import TeacherConfig, read_key

_RETRIED = frozenset({408, 409, 429})  # and 5xx; everything else would fail again
_STOPS = {  # no request of the run can succeed
    401: "the API refuses the key in {key}; set {key} to a valid key",
    402: "the account of the key in {key} is out of credit; add some, then run the same command again",
    404: "the API has no such model or path; check model and base_url",
    405: "nothing there takes such a request; check base_url, which often ends with /v1",
}
_PERMANENT = frozenset({400, 413, 415, 422})  # it is the request itself that is refused
_NO_QUOTA = frozenset({"insufficient_quota", "billing_hard_limit_reached", "billing_not_active"})
_POOL = 16  # connections of one pool, which looks through all of its own for each request
_UNSENT = (httpx2.ConnectError, httpx2.ConnectTimeout, httpx2.PoolTimeout)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Again:
    """An attempt that failed in a way that another may not."""

    detail: str
    wait_s: float | None = None  # that the server asks to wait
    busy: bool = False  # the server asks for fewer requests
    lost: bool = False  # an answer may have been made, and billed, that never came


@dataclasses.dataclass(frozen=True)
class Stop:
    """No request of this run can succeed."""

    reason: str


Outcome = Response | Failure | Again | Stop


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reply:
    """A status, its headers, and a body that holds no key."""

    status: int
    headers: Mapping[str, str]
    body: bytes
    sent: float  # seconds since the epoch


class Api:
    """An API with its key. The key stays in memory: it is cut out of every byte that this class returns.

    Not the SDK: it parses before it returns, and posts again after a read timeout without a word.
    """

    def __init__(self, config: TeacherConfig, connections: int):
        self.config = config
        self._key = read_key(config)
        headers = {"authorization": f"Bearer {self._key}"} if self._key else {}
        self._clients = [
            httpx2.AsyncClient(
                headers=headers,
                timeout=httpx2.Timeout(config.timeout_s, connect=min(config.timeout_s, 30.0)),
                limits=httpx2.Limits(max_connections=None, max_keepalive_connections=2 * _POOL, keepalive_expiry=4.0),
                verify=certificates,
            )
            for certificates in [httpx2.create_ssl_context()] * -(-connections // _POOL)
        ]
        self._turns = itertools.cycle(self._clients)
        self._url = config.base_url.rstrip("/")

    async def close(self) -> None:
        """Closes the connections."""
        for client in self._clients:
            await client.aclose()

    async def call(self, method: str, path: str, body: Any = None, **options: Any) -> Reply | Again:
        """One call; `Again` where no answer came.

        Raises:
          UnicodeEncodeError: the body holds half a surrogate pair.
        """
        content = {} if body is None else {"content": json.dumps(body, ensure_ascii=False).encode()}
        headers = {"content-type": "application/json"} if content else {}
        sent = time.time()
        try:
            got = await next(self._turns).request(method, self._url + path, headers=headers, **content, **options)
        except httpx2.DecodingError as error:
            return Again(detail=f"an answer that cannot be decoded: {self.excerpt(str(error).encode())}", lost=True)
        except httpx2.TransportError as error:  # time-outs too
            detail = self.excerpt(str(error).encode())
            unsent = isinstance(error, _UNSENT)
            return Again(detail=f"no connection: {detail} ({type(error).__name__})", lost=not unsent, busy=not unsent)
        return Reply(status=got.status_code, headers=got.headers, body=self.without_key(got.content), sent=sent)

    def judge(self, reply: Reply) -> Again | Failure | Stop:
        """What an answer that is no success means."""
        status, code = reply.status, _error_code(reply.body)
        what = f"HTTP {status}: {self.excerpt(reply.body)}"
        if 300 <= status < 400:
            place = self.excerpt(reply.headers.get("location", "nowhere").encode())
            return Stop(f"HTTP {status} from {self._url}: it points to {place}; set base_url to where the API is")
        if status in _STOPS:
            return Stop(f"HTTP {status} from {self._url}: {_STOPS[status].format(key=self.config.api_key_env)}")
        if code in _NO_QUOTA:
            return Stop(f"HTTP {status} from {self._url}: the quota of this key is used up; add credit, run again")
        if may_pass(status):
            wait_s = retry_after_s(reply.headers, time.time())
            return Again(detail=what, wait_s=wait_s, busy=status in (429, 503, 529))
        return Failure(detail=what, permanent=status in _PERMANENT)

    def excerpt(self, body: bytes) -> str:
        """The start of a body, for messages: nothing in it moves a terminal's cursor or rings its bell."""
        text = self.without_key(body)[:500].decode(errors="replace")  # cut last: half a key is a secret too
        return "".join(c if c.isprintable() or c in "\n\t" else "\ufffd" for c in text)

    def without_key(self, text: bytes) -> bytes:
        """The text with the key cut out."""
        return text.replace(self._key.encode(), b"[key]") if len(self._key) >= 8 else text


@contextlib.asynccontextmanager
async def connected(config: TeacherConfig) -> AsyncIterator[Api]:
    """An API that is closed at the end."""
    api = Api(config, connections=config.in_flight)
    try:
        yield api
    finally:
        await api.close()


def may_pass(status: int) -> bool:
    """Whether a call with this status may succeed when it is made again."""
    return status in _RETRIED or status >= 500


def _error_code(body: bytes) -> str | None:
    try:
        return json.loads(body)["error"]["code"]
    except (ValueError, LookupError, TypeError, RecursionError):
        return None


def retry_after_s(headers: Mapping[str, str], now: float) -> float | None:
    """Seconds a response asks to wait, None if it does not: `retry-after-ms`, `retry-after` in seconds or as a date."""
    for name, unit_s in (("retry-after-ms", 1e-3), ("retry-after", 1.0)):
        value = headers.get(name, "")
        try:
            wait_s = float(value) * unit_s
        except ValueError:
            try:
                wait_s = email.utils.parsedate_to_datetime(value).timestamp() - now
            except ValueError:
                continue
        if wait_s == wait_s:  # not NaN
            return max(0.0, wait_s)
    return None
