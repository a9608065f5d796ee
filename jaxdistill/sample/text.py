"""From tokens to text while they come: no half characters, and nothing from a stop string on."""

from collections.abc import Sequence
from typing import Any

_UNFINISHED = "\ufffd"  # what a decoder shows for a character of which bytes are missing
_WINDOW = 64  # tokens decoded together at most, as long as characters end
_KEPT = 4  # of them as what comes before: some tokenizers drop a space at the start of what they decode


class TextStream:
    """The text of one output, told in parts that never change afterwards.

    Args:
      stops: strings that end the output; they are not part of it. The one that is complete first counts.
    """

    def __init__(self, tokenizer: Any, stops: Sequence[str] = ()):
        self._tokenizer, self._stops = tokenizer, tuple(stops)
        self._window: list[int] = []
        self._decoded = 0  # characters of the window's text that were passed on
        self._held = ""  # characters that may be the start of a stop string
        self.tokens = 0  # taken so far, the one that completed a stop string included
        self.stopped = False

    def add(self, tokens: Sequence[int]) -> str:
        """The text that these tokens settle. After a stop string nothing is taken any more."""
        said = ""
        # One at a time where the count of tokens before a stop string matters
        for part in ([token] for token in tokens) if self._stops else [list(tokens)]:
            if self.stopped or not part:
                break
            self.tokens += len(part)
            said += self._match(self._decode(part))
        return said

    def end(self) -> str:
        """What was held back, once no more tokens come."""
        rest = "" if self.stopped else self._held + self._text()[self._decoded :]
        self._window, self._decoded, self._held = [], 0, ""
        return rest

    def _text(self) -> str:
        return self._tokenizer.decode(self._window, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def _decode(self, tokens: list[int]) -> str:
        """Characters that are complete: bytes that still lack some are shown as one mark, the last of the text."""
        self._window += tokens
        text = self._text()
        whole = text.removesuffix(_UNFINISHED)
        fresh, self._decoded = whole[self._decoded :], max(self._decoded, len(whole))
        if whole == text and len(self._window) > _WINDOW:
            self._window = self._window[-_KEPT:]
            self._decoded = len(self._text())
        return fresh

    def _match(self, fresh: str) -> str:
        text, self._held = self._held + fresh, ""
        found = [(start + len(stop), start) for stop in self._stops if (start := text.find(stop)) >= 0]
        if found:
            self.stopped = True
            return text[: min(found)[1]]
        longest = max((len(stop) - 1 for stop in self._stops), default=0)
        for length in range(min(longest, len(text)), 0, -1):
            if any(stop.startswith(text[-length:]) for stop in self._stops):
                text, self._held = text[:-length], text[-length:]
                break
        return text
