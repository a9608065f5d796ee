"""The one text form of a long thought, think tags and all: how it is joined and how it is split."""

OPEN, CLOSE = "<think>", "</think>"


def join(reasoning: str, answer: str) -> str:
    r"""`<think>\n{reasoning}\n</think>\n{answer}`."""
    return f"{OPEN}\n{reasoning.strip()}\n{CLOSE}\n{answer.strip()}"


def split(text: str) -> tuple[str | None, str]:
    """Reasoning, None where there are no tags, and the answer after it.

    The reasoning ends at the last closing tag; its opening tag may be missing, since many chat templates put it in the
    prompt. A tag that is opened and never closed was cut off while thinking: there is no answer.
    """
    reasoning, closed, answer = text.rpartition(CLOSE)
    if OPEN in answer:
        reasoning, answer = text, ""
    elif not closed:
        return None, text.strip()
    return reasoning.strip().removeprefix(OPEN).strip(), answer.strip()


class Splitter:
    """Tells reasoning from answer while a text comes; the first closing tag ends the reasoning.

    Args:
      opened: whether the prompt already ends with the opening tag.
    """

    def __init__(self, opened: bool):
        self.thinking: bool | None = True if opened else None  # None: too little has come to tell
        self._held = ""  # may be the start of a tag
        self._answered = False  # whether more than space has come after the reasoning

    def add(self, text: str) -> tuple[str, str]:
        """Further reasoning and further answer."""
        text, self._held = self._held + text, ""
        if self.thinking is None:
            begun = text.lstrip()
            if OPEN.startswith(begun):
                self._held = text
                return "", ""
            self.thinking = begun.startswith(OPEN)
            text = begun.removeprefix(OPEN) if self.thinking else text
        if not self.thinking:
            return "", self._answer(text)
        reasoning, closed, answer = text.partition(CLOSE)
        if closed:
            self.thinking = False
            return reasoning, self._answer(answer)
        start = next((n for n in range(len(CLOSE) - 1, 0, -1) if text.endswith(CLOSE[:n])), 0)
        self._held = text[len(text) - start :]
        return text[: len(text) - start], ""

    def end(self) -> tuple[str, str]:
        """What was held back, once no more comes."""
        rest, self._held = self._held, ""
        return (rest, "") if self.thinking else ("", rest)

    def _answer(self, text: str) -> str:
        text = text if self._answered else text.lstrip()
        self._answered |= bool(text)
        return text
