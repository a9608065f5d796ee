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
