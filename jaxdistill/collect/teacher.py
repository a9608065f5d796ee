"""Which API and model to ask and how: the user's settings, joined with what the profile of the provider says."""

import dataclasses
import datetime
import ipaddress
import os
import re
import urllib.parse
from collections.abc import Mapping
from typing import Any, Literal

from jaxdistill.collect import profiles
from jaxdistill.collect.prices import Prices
from jaxdistill.collect.profiles import Transport
from jaxdistill.collect.request import Request
from jaxdistill.errors import UserError
from jaxdistill.records import Message

_LIMIT_NAMES = ("max_completion_tokens", "max_tokens", "max_output_tokens")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TeacherConfig:
    """Which API and model to ask, how, and how patiently."""

    base_url: str = "https://api.openai.com/v1"  # https, or http on loopback
    model: str = "local-teacher"  # name as the API knows it
    profile: str | None = None  # a file of collect/profiles without .toml, or a path; None: the one with this base_url
    api_key_env: str = "OPENAI_API_KEY"  # environment variable with the key; may be unset on loopback
    transport: Transport | None = None  # background is polled; batch is of chat; None takes the model's first
    max_tokens: int = 32_768  # output limit in tokens, reasoning included
    larger_max_tokens: int | None = None  # limit of one more try where an answer was cut off; None keeps it cut off
    max_tokens_parameter: Literal["max_completion_tokens", "max_tokens"] | None = None  # None takes the profile's
    temperature: float | None = None  # sampling temperature; None leaves it to the server
    top_p: float | None = None  # nucleus mass; None leaves it to the server
    reasoning_effort: str | None = None  # low, medium, high, ...; None leaves it to the server
    extra: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # further fields of the request body
    in_flight: int = 32  # largest number of requests under way in one process; fewer while the server pushes back
    timeout_s: float = 600.0  # seconds until one attempt counts as lost
    poll_s: float = 5.0  # seconds between two looks at an answer in the background, or at a batch
    attempt_limit: int = 8  # attempts per request and run
    backoff_s: float = 1.0  # seconds before the second attempt, doubled after each, with jitter
    longest_wait_s: float = 300.0  # seconds; a server that asks for more fails the request
    refusal_limit: int = 10  # requests refused in a row, without an answer between, that end the run
    input_price_usd: float | None = None  # USD per million prompt tokens; None takes the profile's or the price table's
    output_price_usd: float | None = None  # USD per million output tokens; None as above

    def __post_init__(self) -> None:
        check_url(self.base_url)
        for name in ("max_tokens", "in_flight", "attempt_limit", "refusal_limit"):
            if getattr(self, name) < 1:
                raise UserError(f"teacher.{name} is {getattr(self, name)}, expected at least 1")
        for name in ("timeout_s", "poll_s", "longest_wait_s"):
            if not getattr(self, name) > 0:
                raise UserError(f"teacher.{name} is {getattr(self, name)}, expected more than 0 seconds")
        for name in ("backoff_s", "input_price_usd", "output_price_usd"):
            if (value := getattr(self, name)) is not None and not value >= 0:
                raise UserError(f"teacher.{name} is {value}, expected 0 or more")
        if (self.input_price_usd is None) != (self.output_price_usd is None):
            raise UserError("teacher.input_price_usd and teacher.output_price_usd go together; give both or neither")
        if self.larger_max_tokens is not None and self.larger_max_tokens <= self.max_tokens:
            raise UserError(
                f"teacher.larger_max_tokens is {self.larger_max_tokens}, expected over max_tokens, {self.max_tokens}"
            )
        set_elsewhere = {"model", "messages", "input", "stream", "n", "background", *_LIMIT_NAMES}
        set_elsewhere |= {n for n in ("temperature", "top_p", "reasoning_effort") if getattr(self, n) is not None}
        if reserved := set_elsewhere & self.extra.keys():
            raise UserError(f"teacher.extra holds {sorted(reserved)}; set these by their own options")


def check_url(url: str) -> None:
    """Raises UserError unless the URL is https, or http on loopback, and holds no secret."""
    try:
        parts = urllib.parse.urlsplit(url)
        port = parts.port
    except ValueError:  # brackets without an address in them, or a port that is none
        parts, port = urllib.parse.urlsplit(""), 0
    if parts.scheme not in ("http", "https") or not parts.hostname or port == 0 or re.search(r"\s", url):
        expected = "expected a URL such as https://api.openai.com/v1"
        raise UserError(f"teacher.base_url is {url.rpartition('@')[2].partition('?')[0]!r}, {expected}")
    if parts.username or parts.password or parts.query:
        raise UserError("teacher.base_url holds a user, a password or a query; keys belong in the environment only")
    if parts.scheme == "http" and not is_loopback(url):
        raise UserError(
            f"teacher.base_url is {url!r}; expected https, since http sends the key and the data in the clear"
        )


def is_loopback(url: str) -> bool:
    """Whether a URL names this machine."""
    host = urllib.parse.urlsplit(url).hostname or ""
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
    if not key and not is_loopback(config.base_url):
        raise UserError(
            f"no API key: set the environment variable {config.api_key_env} to the key for {config.base_url}"
        )
    return key


class Teacher:
    """A teacher as configured, with what its profile says about the model.

    Raises:
      UserError: the profile is not usable, or the model does not take a setting or the transport.
    """

    def __init__(self, config: TeacherConfig):
        self.config = config
        self.profile = profiles.find(config.profile, config.base_url)
        self.model = self.profile.model(config.model)
        self.transport: Transport = config.transport or self.model.transports[0]
        if self.transport not in self.model.transports:
            raise UserError(
                f"teacher.transport is {self.transport}, but profile {self.profile.name} says that {config.model} "
                f"takes {', '.join(self.model.transports)}"
            )
        for name in ("temperature", "top_p", "reasoning_effort"):
            if getattr(config, name) is not None and name in self.model.refuses:
                raise UserError(
                    f"teacher.{name} is {getattr(config, name)}, but profile {self.profile.name} says that "
                    f"{config.model} does not take it; leave it out"
                )
        self.prices = Prices.of(config, self.profile, self.model, batch=self.in_batches)

    @property
    def through_responses(self) -> bool:
        """Whether requests have the shape of the Responses API rather than that of chat completions."""
        return self.transport in ("responses", "background", "responses_batch")

    @property
    def in_batches(self) -> bool:
        """Whether requests go through the Batch API."""
        return self.transport in ("batch", "responses_batch")

    def warnings(self, today: datetime.date) -> list[str]:
        """What to know before any money is spent."""
        retires, instead = self.model.retires, self.model.successor
        hint = f"; its successor is {instead}" if instead else ""
        if retires is None or (retires - today).days > 90:
            return []
        if retires <= today:
            return [f"{self.config.model} was retired on {retires}: expect every request to be refused{hint}"]
        return [f"{self.config.model} retires on {retires}, in {(retires - today).days} days{hint}"]

    def request(
        self, messages: tuple[Message, ...], sample_index: int = 0, prompt: str = "", max_tokens: int | None = None
    ) -> Request:
        """The request for one conversation, in the shape of the transport."""
        limit = max_tokens or self.config.max_tokens
        return Request(
            model=self.config.model,
            messages=self._with_system_as_taken(messages),
            parameters=self._parameters(limit),
            sample_index=sample_index,
            prompt=prompt,
            through_responses=self.through_responses,
            max_tokens=limit,
        )

    def _parameters(self, limit: int) -> dict[str, Any]:
        config = self.config
        values: dict[str, Any] = {"temperature": config.temperature, "top_p": config.top_p}
        if self.through_responses:
            reasoning = {"effort": config.reasoning_effort, "summary": self.model.summary}
            values |= {"max_output_tokens": limit}
            values["reasoning"] = {name: value for name, value in reasoning.items() if value is not None} or None
        else:
            name = config.max_tokens_parameter or self.model.max_tokens_parameter
            values |= {name: limit, "reasoning_effort": config.reasoning_effort}
        return {n: v for n, v in values.items() if v is not None} | dict(self.model.extra) | dict(config.extra)

    def _with_system_as_taken(self, messages: tuple[Message, ...]) -> tuple[Message, ...]:
        """System messages under the role that the model takes; where it takes none, in front of the first question."""
        if self.model.system == "none":
            system = [m["content"] for m in messages if m["role"] == "system"]
            first, *rest = [m for m in messages if m["role"] != "system"]
            return ({**first, "content": "\n\n".join([*system, first["content"]])}, *rest)
        return tuple({**m, "role": self.model.system} if m["role"] == "system" else m for m in messages)
