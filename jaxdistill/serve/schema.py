"""What clients may send: OpenAI's bodies, the fields this server acts on; any other is refused, not ignored."""

from typing import Annotated, Any, Literal, TypeVar

import pydantic
from pydantic import Field

from jaxdistill.records import Message
from jaxdistill.sample.request import TOP_LOGPROBS, SamplingConfig

STOPS = 16  # stop strings of one request
CHOICES = 128  # of one prompt
COMPLETION_TOKENS = 16  # what /v1/completions says without max_tokens, as OpenAI's does


class ApiError(Exception):
    """What a client is told instead of an answer."""

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None):
        super().__init__(message)
        self.status, self.param, self.code = status, param, code

    @property
    def body(self) -> dict[str, Any]:
        """In OpenAI's form."""
        kind = "server_error" if self.status >= 500 else "invalid_request_error"
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}


class _Body(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, frozen=True)


class TextPart(_Body):
    """A part of a message; there are no others than text."""

    type: Literal["text"]
    text: str


class ChatMessage(_Body):
    """One turn. Assistants' reasoning goes to the chat template, which may show it."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart]
    reasoning_content: str | None = None
    name: str | None = None

    def message(self) -> Message:
        """As chat templates take it."""
        content = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        role = "system" if self.role == "developer" else self.role  # OpenAI's newer name, which templates do not know
        reasoning = {} if self.reasoning_content is None else {"reasoning_content": self.reasoning_content}
        return {"role": role, "content": content, **reasoning}


def _off(value: bool) -> bool:
    if value:
        raise ValueError("this server does not do that; expected false")
    return value


# Not a Literal: for pydantic 0 is one of Literal[False], and true of Literal[1]
Off = Annotated[bool, pydantic.AfterValidator(_off), pydantic.WithJsonSchema({"const": False})]


class StreamOptions(_Body):
    include_usage: bool | None = None
    include_obfuscation: Off | None = None


class ResponseFormat(_Body):
    type: Literal["text"]


Stop = Annotated[str, Field(min_length=1, max_length=256)]


class Sampled(_Body):
    """What both endpoints take. top_k, min_p and repetition_penalty are not OpenAI's; vLLM names them so."""

    model: str
    max_tokens: Annotated[int, Field(ge=0)] | None = None
    temperature: Annotated[float, Field(ge=0, le=100)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    repetition_penalty: float | None = None
    n: Annotated[int, Field(ge=1, le=CHOICES)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: Stop | Annotated[list[Stop], Field(max_length=STOPS)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: str | None = None  # says nothing about the answer
    metadata: dict[str, str] | None = None  # neither does this

    @property
    def stops(self) -> tuple[str, ...]:
        """Stop strings."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    @property
    def tells_usage(self) -> bool:
        """Whether a stream ends with what was used."""
        return self.stream_options is not None and bool(self.stream_options.include_usage)

    def sampling(self, max_new_tokens: int) -> SamplingConfig:
        """The sampler's settings; OpenAI's defaults where the client sets none.

        Raises:
          UserError: a value is one that the sampler refuses.
        """
        given = {
            name: value
            for name in ("top_p", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty")
            if (value := getattr(self, name)) is not None
        }
        temperature = 1.0 if self.temperature is None else self.temperature
        top_k = max(0, self.top_k or 0)  # -1 keeps all tokens for vLLM
        return SamplingConfig(temperature=temperature, top_k=top_k, max_new_tokens=max(1, max_new_tokens), **given)


class ChatBody(Sampled):
    """POST /v1/chat/completions."""

    messages: Annotated[list[ChatMessage], Field(min_length=1)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=TOP_LOGPROBS)] | None = None
    response_format: ResponseFormat | None = None


_Item = TypeVar("_Item")
_Many = Annotated[list[_Item], Field(min_length=1, fail_fast=True)]  # one mistake in a list says enough


class CompletionBody(Sampled):
    """POST /v1/completions. A prompt is a text, or token ids; several are answered in turn."""

    prompt: str | _Many[str] | _Many[int] | _Many[_Many[int]]
    echo: bool | None = None
    logprobs: Annotated[int, Field(ge=0, le=TOP_LOGPROBS)] | None = None
    best_of: Annotated[int, Field(ge=1, le=1)] | None = None

    @property
    def prompts(self) -> list[str | list[int]]:
        """One or more."""
        prompt: Any = self.prompt
        several = isinstance(prompt, list) and not isinstance(prompt[0], int)
        return list(prompt) if several else [prompt]


Body = TypeVar("Body", ChatBody, CompletionBody)


def parse(kind: type[Body], raw: bytes) -> Body:
    """Reads a body.

    Raises:
      ApiError: it is not JSON in UTF-8, or not as described here; the message names up to three mistakes.
    """
    try:
        return kind.model_validate_json(raw)
    except pydantic.ValidationError as error:
        found = error.errors(include_url=False, include_context=False, include_input=False)
    except RecursionError:
        raise ApiError(400, "The body is nested too deeply.") from None
    told = [f"{_place(one)}: {_reason(one)}" if one["loc"] else one["msg"] for one in found[:3]]
    more = f" (and {len(found) - 3} more)" if len(found) > 3 else ""
    raise ApiError(400, "; ".join(told) + more, str(found[0]["loc"][0]) if found[0]["loc"] else None)


def _place(error: Any) -> str:
    return ".".join(str(part)[:80] for part in error["loc"])


def _reason(error: Any) -> str:
    if error["type"] == "extra_forbidden":
        return "this server has no such field; leave it out"
    return error["msg"]
