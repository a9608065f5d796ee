"""What clients are told: an output as it comes, and OpenAI's objects made of it."""

import dataclasses
import time
import uuid
from collections.abc import Sequence
from typing import Any

from jaxdistill.sample.request import Event, Logprob
from jaxdistill.sample.text import TextStream

_UNFINISHED = "\ufffd"


@dataclasses.dataclass(frozen=True)
class Said:
    """A further part of one output."""

    index: int
    text: str
    tokens: tuple[tuple[int, Logprob | None], ...]  # with log-probabilities, None before the first; if asked for
    finish_reason: str | None  # set in the last part


class Choice:
    """One output on its way.

    Args:
      limit: tokens at most; 0 where only the prompt is to be told, although the sampler says one.
      echo: the prompt's tokens and text, where they come before the output.
      logprobs: whether log-probabilities are told.
    """

    def __init__(
        self, index: int, stream: TextStream, limit: int, echo: tuple[Sequence[int], str] | None, logprobs: bool
    ):
        self.index, self._stream, self._limit, self._echo, self._logprobs = index, stream, limit, echo, logprobs
        self.finish_reason: str | None = None

    @property
    def tokens(self) -> int:
        """Output tokens that were told."""
        return self._stream.tokens

    def take(self, event: Event) -> Said:
        """What an event of the sampler adds."""
        text, told = "", []
        if self._echo is not None:
            prompt, text = self._echo
            self._echo = None
            told += [(prompt[0], None), *((one.token, one) for one in event.prompt_logprobs)]
        before = self.tokens
        text += self._stream.add(event.tokens[: self._limit - before])
        self.finish_reason = "stop" if self._stream.stopped else event.finish_reason
        if self._limit == 0:
            self.finish_reason = event.finish_reason and "length"
        if self.finish_reason:
            text += self._stream.end()
        told += [(one.token, one) for one in event.logprobs[: self.tokens - before]]
        return Said(self.index, text, tuple(told) if self._logprobs else (), self.finish_reason)


@dataclasses.dataclass
class Usage:
    """Tokens of a call."""

    prompt: int
    output: int = 0

    def object(self) -> dict[str, int]:
        total = self.prompt + self.output
        return {"prompt_tokens": self.prompt, "completion_tokens": self.output, "total_tokens": total}


class Reply:
    """The objects of one call; `kind` is the endpoint's.

    Args:
      top: most likely tokens told beside each, None without log-probabilities.
    """

    def __init__(self, model: str, fingerprint: str, tokenizer: Any, top: int | None):
        self.id = f"{self.prefix}-{uuid.uuid4().hex}"
        self._model, self._fingerprint, self._tokenizer, self._top = model, fingerprint, tokenizer, top
        self._created = int(time.time())

    prefix, whole, chunk = "", "", ""  # of ids; names of the objects

    def envelope(self, kind: str, choices: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
        """An object around choices."""
        about = {"id": self.id, "object": kind, "created": self._created, "model": self._model}
        return {**about, "system_fingerprint": self._fingerprint, "choices": choices, **more}

    def answer(self, said: Sequence[Sequence[Said]], usage: Usage) -> dict[str, Any]:
        """The whole answer, of the parts of each choice."""
        choices = []
        for parts in said:
            tokens = tuple(token for part in parts for token in part.tokens)
            joined = Said(parts[-1].index, "".join(p.text for p in parts), tokens, parts[-1].finish_reason)
            choices.append(self._choice(joined, "message", first=True))
        return self.envelope(self.whole, choices, usage=usage.object())

    def part(self, said: Said, first: bool) -> dict[str, Any]:
        """One event of a stream.

        Args:
          first: whether it is the choice's first.
        """
        return self.envelope(self.chunk, [self._choice(said, "delta", first)])

    def usage(self, usage: Usage) -> dict[str, Any]:
        """The last event of a stream, where it was asked for."""
        return self.envelope(self.chunk, [], usage=usage.object())

    def _choice(self, said: Said, where: str, first: bool) -> dict[str, Any]:
        raise NotImplementedError

    def _text(self, token: int) -> str:
        return self._tokenizer.decode([token], clean_up_tokenization_spaces=False)


class ChatReply(Reply):
    """/v1/chat/completions."""

    prefix, whole, chunk = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def _choice(self, said: Said, where: str, first: bool) -> dict[str, Any]:
        message = {"role": "assistant", "content": said.text} if first else {"content": said.text}
        return {
            "index": said.index,
            where: message,
            "logprobs": None
            if self._top is None
            else {"content": [self._logprob(one) for _, one in said.tokens if one]},
            "finish_reason": said.finish_reason,
        }

    def _logprob(self, one: Logprob) -> dict[str, Any]:
        top = [self._token(token, value) for token, value in one.top[: self._top]]
        return {**self._token(one.token, one.logprob), "top_logprobs": top}

    def _token(self, token: int, logprob: float) -> dict[str, Any]:
        text = self._text(token)
        # A token may hold a part of a character; then OpenAI's form has no place for it but this
        bytes_ = None if _UNFINISHED in text else list(text.encode())
        return {"token": text, "logprob": logprob, "bytes": bytes_}


class CompletionReply(Reply):
    """/v1/completions."""

    prefix, whole, chunk = "cmpl", "text_completion", "text_completion"

    def __init__(self, *args: Any):
        super().__init__(*args)
        self._offsets: dict[int, int] = {}  # characters of the tokens told so far, by choice

    def _choice(self, said: Said, where: str, first: bool) -> dict[str, Any]:
        logprobs = None if self._top is None else self._logprobs(said)
        return {"index": said.index, "text": said.text, "logprobs": logprobs, "finish_reason": said.finish_reason}

    def _logprobs(self, said: Said) -> dict[str, Any]:
        texts = [self._text(token) for token, _ in said.tokens]
        offsets = [self._offsets.get(said.index, 0)]
        for text in texts:
            offsets.append(offsets[-1] + len(text))
        self._offsets[said.index] = offsets.pop()
        return {
            "tokens": texts,
            "token_logprobs": [one and one.logprob for _, one in said.tokens],
            "top_logprobs": [one and self._likely(one) for _, one in said.tokens],
            "text_offset": offsets,
        }

    def _likely(self, one: Logprob) -> dict[str, float]:
        """By text, the token itself included; of tokens that read the same, the most likely."""
        found: dict[str, float] = {}
        for token, value in (*one.top[: self._top], (one.token, one.logprob)):
            found.setdefault(self._text(token), value)
        return found
