"""Sends requests to an OpenAI-compatible API: what is retried, how long it waits, how many are in flight."""

import asyncio
import dataclasses
import email.utils
import ipaddress
import json
import os
import random
import time
import urllib.parse
from collections.abc import Callable, Mapping
from typing import Any, Literal

import openai

from jaxdistill.collect.ledger import Failure, Ledger, Request, Response
from jaxdistill.collect.reply import NoCompletion, check_completion
from jaxdistill.errors import UserError
from jaxdistill.records import Message

_RETRIED = frozenset({408, 409, 429})  # and 5xx; everything else would fail again
_STOPS = {  # no request of the run can succeed
    401: "the API refuses the key in {key}; set {key} to a valid key",
    402: "the account of the key in {key} is out of credit; add some, then run the same command again",
    403: "the API forbids this key ({key}) to use the model; ask for access or choose another model",
    404: "the API has no such model or path; check model and base_url",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class TeacherConfig:
    """Which API and model to ask, how, and how patiently."""

    base_url: str = "https://api.openai.com/v1"  # https, or http on loopback
    model: str = "local-teacher"  # name as the API knows it
    api_key_env: str = "OPENAI_API_KEY"  # environment variable with the key; may be unset on loopback
    max_tokens: int = 32_768  # output limit in tokens, reasoning included
    max_tokens_parameter: Literal["max_completion_tokens", "max_tokens"] = "max_completion_tokens"  # servers differ
    temperature: float | None = None  # sampling temperature; None leaves it to the server
    top_p: float | None = None  # nucleus mass; None leaves it to the server
    extra: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # further fields of the request body
    in_flight: int = 32  # largest number of requests under way
    timeout_s: float = 600.0  # seconds until one attempt counts as lost
    attempt_limit: int = 8  # attempts per request and run
    backoff_s: float = 1.0  # seconds before the second attempt, doubled after each, with jitter
    longest_wait_s: float = 300.0  # seconds; a server that asks for more fails the request
    input_price_usd: float = 0.0  # USD per million prompt tokens; 0 records no cost
    output_price_usd: float = 0.0  # USD per million output tokens; 0 records no cost

    def __post_init__(self) -> None:
        _check_url(self.base_url)
        for name in ("max_tokens", "in_flight", "attempt_limit"):
            if getattr(self, name) < 1:
                raise UserError(f"teacher.{name} is {getattr(self, name)}, expected at least 1")
        for name in ("timeout_s", "longest_wait_s"):
            if not getattr(self, name) > 0:
                raise UserError(f"teacher.{name} is {getattr(self, name)}, expected more than 0 seconds")
        for name in ("backoff_s", "input_price_usd", "output_price_usd"):
            if not getattr(self, name) >= 0:
                raise UserError(f"teacher.{name} is {getattr(self, name)}, expected 0 or more")
        if reserved := {"model", "messages", "stream", "n", *self._named_parameters()} & self.extra.keys():
            raise UserError(f"teacher.extra holds {sorted(reserved)}; set these by their own options")

    def _named_parameters(self) -> dict[str, Any]:
        values = {self.max_tokens_parameter: self.max_tokens, "temperature": self.temperature, "top_p": self.top_p}
        return {name: value for name, value in values.items() if value is not None}

    def request(self, messages: tuple[Message, ...], sample_index: int = 0) -> Request:
        """The request for one conversation."""
        parameters = {**self._named_parameters(), **self.extra}
        return Request(model=self.model, messages=messages, parameters=parameters, sample_index=sample_index)


def _check_url(url: str) -> None:
    parts = urllib.parse.urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise UserError(f"teacher.base_url is {url!r}, expected a URL such as https://api.openai.com/v1")
    if parts.username or parts.password or parts.query:
        raise UserError("teacher.base_url holds a user, a password or a query; keys belong in the environment only")
    if parts.scheme == "http" and not _is_loopback(parts.hostname):
        raise UserError(
            f"teacher.base_url is {url!r}; expected https, since http sends the key and the data in the clear"
        )


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def read_key(config: TeacherConfig) -> str:
    """The API key; empty where none is set and the API is on loopback.

    Raises:
      UserError: the environment holds no key and the API is elsewhere.
    """
    key = os.environ.get(config.api_key_env, "")
    if not key and not _is_loopback(urllib.parse.urlsplit(config.base_url).hostname or ""):
        raise UserError(
            f"no API key: set the environment variable {config.api_key_env} to the key for {config.base_url}"
        )
    return key


class Client:
    """An API with its key. The key stays in memory: it is cut out of every byte this class returns."""

    def __init__(self, config: TeacherConfig):
        self.config = config
        self._key = read_key(config)
        self._slots = asyncio.Semaphore(config.in_flight)
        self._sdk = openai.AsyncOpenAI(
            api_key=self._key or "none",
            base_url=config.base_url,
            timeout=config.timeout_s,
            max_retries=0,  # the SDK would post again without a word
        )

    async def __aenter__(self) -> "Client":
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._sdk.close()

    async def ask(self, request: Request) -> Response | Failure:
        """Sends one request until it is answered, refused, or out of attempts.

        A slot is held only while an attempt is under way, so that other requests go ahead during the waits.

        Raises:
          UserError: the API refuses the key, the model, or to work on credit: no request of this run can succeed.
        """
        detail = ""
        for attempt in range(1, self.config.attempt_limit + 1):
            async with self._slots:
                outcome = await self._send(request)
            if isinstance(outcome, Response | Failure):
                return dataclasses.replace(outcome, attempts=attempt)
            detail, asked_s = outcome
            if asked_s is not None and asked_s > self.config.longest_wait_s:
                detail = f"{detail}; asked to wait {asked_s:.0f} s, over longest_wait_s"
                return Failure(detail=detail, permanent=False, attempts=attempt)
            if attempt < self.config.attempt_limit:
                await asyncio.sleep(self._wait_s(attempt, asked_s))
        detail = f"{detail}; gave up after {self.config.attempt_limit} attempts"
        return Failure(detail=detail, permanent=False, attempts=self.config.attempt_limit)

    def _wait_s(self, attempt: int, asked_s: float | None) -> float:
        backoff_s = min(self.config.backoff_s * 2 ** (attempt - 1), self.config.longest_wait_s)
        if asked_s is not None:
            return asked_s + random.uniform(0, 0.25) * min(backoff_s, 1.0)  # never earlier than asked
        return backoff_s * random.uniform(0.5, 1.0)

    async def _send(self, request: Request) -> Response | Failure | tuple[str, float | None]:
        """One attempt; a pair (what went wrong, seconds the server asked to wait) means: try again."""
        try:
            raw = await self._sdk.chat.completions.with_raw_response.create(
                model=request.model,
                messages=[dict(m) for m in request.messages],  # pyright: ignore[reportArgumentType]
                extra_body=dict(request.parameters),
            )
            return self._accept(raw.content, raw.headers)
        except UnicodeEncodeError as error:
            return Failure(detail=f"the text cannot be sent as UTF-8: {error.reason}", permanent=True)
        except openai.APIStatusError as error:
            status, headers, body = error.status_code, error.response.headers, error.response.content
        except openai.APIConnectionError as error:  # time-outs too
            return f"no connection: {error} ({type(error.__cause__).__name__})", None
        what = f"HTTP {status}: {self._excerpt(body)}"
        if status in _STOPS:
            raise UserError(
                f"HTTP {status} from {self.config.base_url}: {_STOPS[status].format(key=self.config.api_key_env)}"
            )
        if status == 429 and _error_code(body) == "insufficient_quota":
            raise UserError(
                f"HTTP 429 from {self.config.base_url}: the quota of this key is used up; add credit, run again"
            )
        if status in _RETRIED or status >= 500:
            return what, retry_after_s(headers, time.time())
        return Failure(detail=what, permanent=True)

    def _accept(self, body: bytes, headers: Mapping[str, str]) -> Response | tuple[str, float | None]:
        """An HTTP 200; a proxy's page, or an error that calls itself a success, is no answer: try again.

        Whatever else came was paid for and is kept, even if nothing here can read it.
        """
        body = self._without_key(body)
        try:
            check_completion(body)
        except NoCompletion as error:
            return f"HTTP 200, but {error}: {self._excerpt(body)}", retry_after_s(headers, time.time())
        return Response(raw=body, request_id=headers.get("x-request-id", ""), received=time.time())

    def _excerpt(self, body: bytes) -> str:
        return self._without_key(body)[:500].decode(errors="replace")  # cut last: half a key is a secret too

    def _without_key(self, text: bytes) -> bytes:
        return text.replace(self._key.encode(), b"[key]") if len(self._key) >= 8 else text


def _error_code(body: bytes) -> str | None:
    try:
        return json.loads(body)["error"]["code"]
    except (ValueError, LookupError, TypeError):
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


async def fulfil(
    config: TeacherConfig, ledger: Ledger, requests: Mapping[str, Request], settled: Callable[[], None]
) -> None:
    """Sends the requests (by key) that the ledger does not hold an answer to; calls `settled` after each.

    Every request is recorded before the first is sent, every answer is committed before anything reads it.
    """
    ledger.record(requests.values())
    pending = ledger.pending()

    async def one(client: Client, key: str, request: Request) -> None:
        outcome = await client.ask(request)
        if isinstance(outcome, Response):
            ledger.finish(key, outcome)
        else:
            ledger.fail(key, outcome)
        settled()

    async with Client(config) as client:
        try:
            async with asyncio.TaskGroup() as tasks:
                for key, request in requests.items():
                    if key in pending:
                        tasks.create_task(one(client, key, request))
        except* (UserError, OSError) as errors:  # OSError: the ledger's disk is full
            raise errors.exceptions[0] from None
