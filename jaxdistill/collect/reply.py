"""Reads the raw body of a chat completion: where the reasoning is, how it ended, what it used."""

import dataclasses
import json
from collections.abc import Mapping
from typing import Any, Literal, cast

from jaxdistill.records import FinishReason, Message, Usage

OPEN, CLOSE = "<think>", "</think>"
_GAVE_UP = "insufficient_system_resource"  # DeepSeek's word for an answer that its server broke off


class UnreadableReply(ValueError):  # noqa: N818
    """The body is not a chat completion that ended in a known way."""


class NoCompletion(UnreadableReply):
    """The body is no chat completion at all, or one that the server itself gave up: nothing to keep."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reply:
    """One answer, its reasoning apart."""

    reasoning: str | None
    content: str
    finish_reason: FinishReason
    usage: Usage
    model: str  # as the server gave it

    @property
    def reasoning_kind(self) -> Literal["full", "answer_only"]:
        """A chat completion carries its raw reasoning or none of it."""
        return "answer_only" if self.reasoning is None else "full"

    @property
    def text(self) -> str:
        """The whole output in one string, reasoning inside think tags."""
        return self.content if self.reasoning is None else join_reasoning(self.reasoning, self.content)

    @property
    def message(self) -> Message:
        """The answer as a chat message."""
        reasoning = {} if self.reasoning is None else {"reasoning_content": self.reasoning}
        return {"role": "assistant", "content": self.content, **reasoning}


def join_reasoning(reasoning: str, content: str) -> str:
    r"""The one text form of a long thought: `<think>\n{reasoning}\n</think>\n{content}`."""
    return f"{OPEN}\n{reasoning.strip()}\n{CLOSE}\n{content.strip()}"


def split_reasoning(message: Mapping[str, Any]) -> tuple[str | None, str]:
    """Reasoning (None where the message holds none) and content of an answer.

    Reads `reasoning_content` (DeepSeek, vLLM, SGLang), `reasoning` (OpenRouter, newer vLLM), or think tags in the
    content; the opening tag may be missing, since many chat templates put it in the prompt.
    """
    content = message.get("content") or ""
    if not isinstance(content, str):
        raise UnreadableReply(f"content is a {type(content).__name__}, expected a string")
    for field in ("reasoning_content", "reasoning"):
        reasoning = message.get(field)
        if isinstance(reasoning, str) and reasoning.strip():
            return reasoning.strip(), content.strip()
    if CLOSE in content:
        before, _, after = content.rpartition(CLOSE)
        return before.strip().removeprefix(OPEN).strip(), after.strip()
    if content.lstrip().startswith(OPEN):  # cut off while thinking
        return content.strip().removeprefix(OPEN).strip(), ""
    return None, content.strip()


def check_completion(raw: bytes) -> tuple[dict[str, Any], dict[str, Any], Any]:
    """The body of a chat completion, its message and its finish_reason, whatever they hold.

    Raises:
      NoCompletion: says what was found.
    """
    try:
        body = json.loads(raw)
        choice = body["choices"][0]
        message, finish_reason = choice["message"], choice.get("finish_reason")
    except (ValueError, RecursionError, LookupError, TypeError, AttributeError) as error:
        raise NoCompletion(f"not a chat completion ({type(error).__name__}: {error})") from None
    if not isinstance(message, dict):
        raise NoCompletion(f"not a chat completion (its message is a {type(message).__name__})")
    if finish_reason == _GAVE_UP:
        raise NoCompletion(f"finish_reason is {finish_reason}")
    return body, message, finish_reason


def read_reply(raw: bytes) -> Reply:
    """Parses the body of a chat completion.

    Raises:
      UnreadableReply: says what was found.
    """
    body, message, finish_reason = check_completion(raw)
    if finish_reason not in ("stop", "length", "content_filter"):
        raise UnreadableReply(f"finish_reason is {finish_reason!r}, expected stop, length or content_filter")
    reasoning, content = split_reasoning(message)
    return Reply(
        reasoning=reasoning,
        content=content,
        finish_reason=cast(FinishReason, finish_reason),
        usage=_usage(body.get("usage")),
        model=str(body.get("model") or ""),
    )


def _usage(usage: Any) -> Usage:
    """Token counts; 0 for what a server leaves out or does not give as a possible number."""

    def count(values: Mapping[str, Any], name: str) -> int:
        value = values.get(name)
        return int(value) if isinstance(value, int | float) and 0 <= value < 1e15 else 0  # 1e999 is valid JSON

    usage = usage if isinstance(usage, dict) else {}
    details = usage.get("completion_tokens_details")
    details = details if isinstance(details, dict) else {}
    return Usage(
        prompt_tokens=count(usage, "prompt_tokens"),
        output_tokens=count(usage, "completion_tokens"),
        reasoning_tokens=count(details, "reasoning_tokens"),
    )
