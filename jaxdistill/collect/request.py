"""One call to a teacher, addressed by its content, and what came of it."""

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from typing import Any

from jaxdistill.records import Message


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Request:
    """One call, addressed by its content."""

    model: str
    messages: tuple[Message, ...]
    parameters: Mapping[str, Any]
    sample_index: int
    prompt: str = ""  # name and hash of the prompt file that the messages were made with
    through_responses: bool = False  # the body has the shape of the Responses API
    max_tokens: int = 0  # the output limit among the parameters

    @property
    def body(self) -> dict[str, Any]:
        """What is sent."""
        messages = [dict(m) for m in self.messages]
        return {"model": self.model, "input" if self.through_responses else "messages": messages, **self.parameters}

    @property
    def prompt_hash(self) -> str:
        """SHA-256 of model, messages, parameters and prompt file: the same for all samples of one prompt."""
        return _digest([self.body, self.prompt])

    @property
    def key(self) -> str:
        """SHA-256 of all that makes the request; its name in the ledger."""
        return _digest([self.prompt_hash, self.sample_index])

    @property
    def most_prompt_tokens(self) -> int:
        """A bound on its prompt tokens: a token is a byte or more; 16 a message and 128 are for the chat template."""
        text = sum(len(m["content"].encode(errors="replace")) + 16 for m in self.messages)
        return text + 128


@dataclasses.dataclass(frozen=True, kw_only=True)
class Response:
    """The body of an answer, before anything reads it."""

    raw: bytes
    request_id: str
    sent: float  # seconds since the epoch
    received: float
    attempts: int = 1
    nano: int = 0  # cost in billionths of a dollar, once it was read


@dataclasses.dataclass(frozen=True, kw_only=True)
class Failure:
    """Why there is no answer."""

    detail: str
    permanent: bool  # the server refused this request, or it cannot be sent; asking again would change nothing
    attempts: int = 1
