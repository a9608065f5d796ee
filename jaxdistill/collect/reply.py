"""Reads the raw body of an answer, whichever API it came through: its reasoning, how it ended, what it used."""

import dataclasses
import json
from collections.abc import Iterable, Mapping
from typing import Any, Literal

from jaxdistill import thinking
from jaxdistill.records import FinishReason, Message, Usage

ReasoningKind = Literal["full", "summary", "answer_only"]
_GAVE_UP = "insufficient_system_resource"  # DeepSeek's word for an answer that its server broke off


class UnreadableReply(ValueError):  # noqa: N818
    """The body is not an answer that ended in a known way."""


class NoCompletion(UnreadableReply):
    """The body is no answer at all, or one that the server itself gave up: nothing to keep."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reply:
    """One answer, its reasoning apart."""

    reasoning: str | None
    reasoning_kind: ReasoningKind
    content: str
    finish_reason: FinishReason
    usage: Usage
    model: str  # as the server gave it

    @property
    def text(self) -> str:
        """The whole output in one string, reasoning inside think tags."""
        return self.content if self.reasoning is None else thinking.join(self.reasoning, self.content)

    @property
    def message(self) -> Message:
        """The answer as a chat message."""
        reasoning = {} if self.reasoning is None else {"reasoning_content": self.reasoning}
        return {"role": "assistant", "content": self.content, **reasoning}


def parse(raw: bytes) -> dict[str, Any]:
    """The answer in a body: a chat completion with a message, or an object of the Responses API.

    Raises:
      NoCompletion: says what was found.
    """
    try:
        body = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise NoCompletion(f"not a chat completion ({type(error).__name__}: {error})") from None
    if not isinstance(body, dict):
        raise NoCompletion(f"not a chat completion (a JSON {type(body).__name__})")
    if "custom_id" in body:  # a line of a batch's output
        body = (body.get("response") or {}).get("body") or {}
    if isinstance(body.get("output"), list):
        return body
    try:
        choice = body["choices"][0]
        message, finish_reason = choice["message"], choice.get("finish_reason")
    except (LookupError, TypeError, AttributeError) as error:
        raise NoCompletion(f"not a chat completion ({type(error).__name__}: {error})") from None
    if not isinstance(message, dict):
        raise NoCompletion(f"not a chat completion (its message is a {type(message).__name__})")
    if finish_reason == _GAVE_UP:
        raise NoCompletion(f"finish_reason is {finish_reason}")
    return body


def read_reply(raw: bytes) -> Reply:
    """Parses the body of an answer.

    Raises:
      UnreadableReply: says what was found.
    """
    body = parse(raw)
    if "output" in body:
        kind, reasoning, content, finish_reason = _read_response(body)
    else:
        choice = body["choices"][0]
        kind, reasoning, content = _read_message(choice["message"])
        finish_reason = choice.get("finish_reason")
    if finish_reason not in ("stop", "length", "content_filter"):
        raise UnreadableReply(f"finish_reason is {finish_reason!r}, expected stop, length or content_filter")
    return Reply(
        reasoning=reasoning,
        reasoning_kind=kind,
        content=content,
        finish_reason=finish_reason,
        usage=_usage(body.get("usage")) or Usage(),
        model=str(body.get("model") or ""),
    )


def read_usage(raw: bytes) -> Usage | None:
    """What an answer used, None if it does not say."""
    try:
        return _usage(parse(raw).get("usage"))
    except NoCompletion:
        return None


def _read_message(message: Mapping[str, Any]) -> tuple[ReasoningKind, str | None, str]:
    """Kind, reasoning and content of a chat message.

    Reads `reasoning_details` (OpenRouter), `reasoning_content` (DeepSeek, vLLM, SGLang), `reasoning` (OpenRouter, newer
    vLLM), thinking parts of a content in parts (Mistral), or think tags in the content.
    """
    content, thought = _content(message.get("content"))
    kinds = _details(message.get("reasoning_details"))
    for kind in ("full", "summary"):
        if kinds[kind]:
            return kind, kinds[kind], content
    for text in (message.get("reasoning_content"), message.get("reasoning"), thought):
        if isinstance(text, str) and text.strip():
            return "full", text.strip(), content
    reasoning, content = thinking.split(content)
    return ("answer_only" if reasoning is None else "full"), reasoning, content


def _content(content: Any) -> tuple[str, str]:
    """Text and thought of a content, which is a string or a list of parts."""
    if content is None or isinstance(content, str):
        return (content or "").strip(), ""
    if not isinstance(content, list) or not all(isinstance(part, dict) for part in content):
        raise UnreadableReply(f"content is a {type(content).__name__}, expected a string or a list of parts")
    thought = "".join(_content(p.get("thinking"))[0] for p in content if p.get("type") == "thinking")
    return _joined(content, ("text", "output_text"), "text"), thought


def _details(details: Any) -> dict[str, str]:
    """The reasoning in OpenRouter's `reasoning_details`, by kind; encrypted parts hold nothing to read."""
    parts = [d for d in details if isinstance(d, dict)] if isinstance(details, list) else []
    return {
        "full": _joined(parts, ("reasoning.text",), "text"),
        "summary": _joined(parts, ("reasoning.summary",), "summary"),
    }


def _joined(parts: Iterable[Mapping[str, Any]], types: tuple[str, ...], field: str, between: str = "") -> str:
    texts = (part.get(field) for part in parts if part.get("type") in types)
    return between.join(text for text in texts if isinstance(text, str)).strip()


def _read_response(body: Mapping[str, Any]) -> tuple[ReasoningKind, str | None, str, Any]:
    """Kind, reasoning, content and finish reason of an object of the Responses API."""
    items = [item for item in body["output"] if isinstance(item, dict)]

    def parts(kind: str, field: str) -> list[Mapping[str, Any]]:
        found = (item.get(field) for item in items if item.get("type") == kind)
        return [part for values in found if isinstance(values, list) for part in values if isinstance(part, dict)]

    content = _joined(parts("message", "content"), ("output_text",), "text")
    full = _joined(parts("reasoning", "content"), ("reasoning_text",), "text", "\n\n")
    summary = _joined(parts("reasoning", "summary"), ("summary_text",), "text", "\n\n")
    details = body.get("incomplete_details")
    reason = details.get("reason") if isinstance(details, dict) else None
    finish = {"max_output_tokens": "length", "content_filter": "content_filter"}.get(str(reason))
    if body.get("status") == "completed":
        finish = "stop"
    if full or summary:
        return ("full" if full else "summary"), full or summary, content, finish or body.get("status")
    reasoning, content = thinking.split(content)
    return ("answer_only" if reasoning is None else "full"), reasoning, content, finish or body.get("status")


def _usage(usage: Any) -> Usage | None:
    """Token counts under either API's names, 0 for what is left out or no possible number; None if all are."""
    if not isinstance(usage, dict):
        return None

    def count(values: Any, *names: str) -> int:
        values = values if isinstance(values, dict) else {}
        value = next((values[name] for name in names if name in values), 0)
        return int(value) if isinstance(value, int | float) and 0 <= value < 1e15 else 0  # 1e999 is valid JSON

    details = usage.get("completion_tokens_details") or usage.get("output_tokens_details")
    prompt = usage.get("prompt_tokens_details") or usage.get("input_tokens_details")
    found = Usage(
        prompt_tokens=count(usage, "prompt_tokens", "input_tokens"),
        output_tokens=count(usage, "completion_tokens", "output_tokens"),
        reasoning_tokens=count(details, "reasoning_tokens"),
        cached_tokens=count(prompt, "cached_tokens") or count(usage, "prompt_cache_hit_tokens"),  # DeepSeek's
    )
    return found if found.prompt_tokens or found.output_tokens else None
