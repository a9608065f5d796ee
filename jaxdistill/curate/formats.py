"""Reads problem pools and long-thought sets of whatever shape into one: which keys mean what, found row by row."""

import dataclasses
import re
from collections.abc import Callable, Mapping
from typing import Any

from jaxdistill import thinking
from jaxdistill.curate.text import language
from jaxdistill.records import Example, Problem

Values = Mapping[str, Any]


class UnknownShape(ValueError):  # noqa: N818
    """No importer fits; the message says which keys were found and which are understood."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Imported:
    """One row of any source."""

    shape: str  # name of the importer that read it
    problem: str
    answer: str | None = None
    solution: str | None = None  # worked solution of the source
    reasoning: str | None = None  # the thought, without tags
    response: str | None = None  # what follows the thought; the whole output where the two are not apart
    unfinished: bool = False  # the thought was opened and never closed


_THOUGHTS = tuple(
    (re.compile(opening), re.compile(closing))
    for opening, closing in (
        (r"<think>|<thinking>", r"</think>|</thinking>"),
        (r"<Thought>", r"</Thought>"),
        (r"<reasoning>", r"</reasoning>"),
        (r"<\|begin_of_thought\|>", r"<\|end_of_thought\|>"),
    )
)
_WRAPPERS = re.compile(r"</?Output>|</?answer>|<\|(?:begin|end)_of_solution\|>")


def split_thought(text: str) -> tuple[str | None, str, bool]:
    """Thought, the rest, and whether the thought was never closed; reads the tags of common models.

    The opening tag may be missing, since many chat templates put it into the prompt.
    """
    for opening, closing in _THOUGHTS:
        if ends := list(closing.finditer(text)):
            before, after = text[: ends[-1].start()], text[ends[-1].end() :]
            thought = opening.sub("", closing.sub("", before)).strip()
            return thought or None, _WRAPPERS.sub("", after).strip(), False
        if start := opening.search(text):
            return text[start.end() :].strip(), "", True
    return None, _WRAPPERS.sub("", text).strip(), False


def _text(value: Any) -> str | None:
    """A string or a number as text, None for all else and for nothing."""
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        return None
    return str(value).strip() or None


def _first(values: Values, *names: str) -> str | None:
    return next((text for name in names if (text := _text(values.get(name)))), None)


_PROBLEM, _ANSWER = ("problem", "question"), ("answer", "final_answer", "ground_truth", "expected_answer")
_RESPONSE = ("response", "completion", "output", "generation")


def _problem(values: Values) -> Imported | None:
    """A problem with or without answer and solution: MATH, GSM8K, NuminaMath, DeepScaleR, our own."""
    problem = _first(values, *_PROBLEM)
    if problem is None or _first(values, *_RESPONSE, *_REASONING) is not None:
        return None
    answer, solution = _first(values, *_ANSWER), _first(values, "solution", "worked_solution")
    if answer and "####" in answer and not solution:  # GSM8K: steps, then four hashes and the answer
        solution, _, answer = (part.strip() for part in answer.rpartition("####"))
    return Imported(shape="problem", problem=problem, answer=answer, solution=solution)


_REASONING = ("reasoning", "reasoning_content", "thinking", "thought", "chain_of_thought", "cot")


def _reasoning(values: Values) -> Imported | None:
    """question, reasoning, answer: DeepSeek traces and many open sets; the output may be apart from the answer."""
    problem, reasoning = _first(values, *_PROBLEM, "prompt", "instruction"), _first(values, *_REASONING)
    if problem is None or reasoning is None:
        return None
    answer = _first(values, *_ANSWER)
    response = _first(values, *_RESPONSE) or answer
    return Imported(shape="reasoning", problem=problem, answer=answer, reasoning=reasoning, response=response)


def _response(values: Values) -> Imported | None:
    """prompt and response, instruction and output, or problem and response with tags or without."""
    problem = _first(values, *_PROBLEM, "prompt", "instruction", "query")
    response = _first(values, *_RESPONSE)
    if problem is None or response is None:
        return None
    if context := _text(values.get("input")):  # Alpaca
        problem = f"{problem}\n\n{context}"
    return _with_thought("response", problem, response, _first(values, *_ANSWER), _first(values, "solution"))


_USERS, _ASSISTANTS = ("user", "human"), ("assistant", "gpt", "model", "bot")


def _conversation(values: Values) -> Imported | None:
    """Chat messages (role, content) or ShareGPT (from, value): one question, the last answer to it."""
    turns = values.get("messages") or values.get("conversations") or values.get("conversation")
    if not isinstance(turns, list) or not all(isinstance(turn, Mapping) for turn in turns):
        return None
    said = [(_first(turn, "role", "from"), _first(turn, "content", "value"), turn) for turn in turns]
    asked = [text for role, text, _ in said if role in _USERS]
    replied = [(text, turn) for role, text, turn in said if role in _ASSISTANTS]
    if len(asked) != 1 or asked[0] is None or not replied:
        return None  # more turns need a template of their own
    text, turn = replied[-1]
    reasoning = _first(turn, *_REASONING)
    if reasoning is not None:
        return Imported(
            shape="messages", problem=asked[0], answer=_first(values, *_ANSWER), reasoning=reasoning, response=text
        )
    return _with_thought("messages", asked[0], text or "", _first(values, *_ANSWER), None)


def _with_thought(shape: str, problem: str, output: str, answer: str | None, solution: str | None) -> Imported:
    reasoning, response, unfinished = split_thought(output)
    return Imported(
        shape=shape,
        problem=problem,
        answer=answer,
        solution=solution,
        reasoning=reasoning,
        response=response or None,
        unfinished=unfinished,
    )


SHAPES: dict[str, Callable[[Values], Imported | None]] = {
    "messages": _conversation,
    "reasoning": _reasoning,
    "response": _response,
    "problem": _problem,
}


def read_row(values: Values) -> Imported:
    """The row in its one shape.

    Raises:
      UnknownShape: no importer fits.
    """
    for read in SHAPES.values():
        if (row := read(values)) is not None:
            return row
    raise UnknownShape(
        f"keys {sorted(values)[:12]} fit no known shape; expected text under problem or question (answer, solution), "
        "question + reasoning + answer, prompt or problem + response, instruction + output, messages with role and "
        "content, or conversations with from and value, of one question each"
    )


def row_id(values: Values, fallback: str) -> str:
    """The row's own id, or the fallback."""
    return _first(values, "id", "uuid", "problem_id", "unique_id") or fallback


_OWN = frozenset(
    (*_PROBLEM, *_ANSWER, *_RESPONSE, *_REASONING, "id", "solution", "source", "licence", "license", "language")
)


def to_problem(row: Imported, values: Values, name: str) -> Problem:
    """The problem of a row; plain values under other keys go to its meta."""
    stored = values.get("meta")
    meta = dict(stored) if isinstance(stored, Mapping) else {}
    meta |= {k: v for k, v in values.items() if k not in _OWN and isinstance(v, str | int | float | bool)}
    return Problem(
        id=name,
        problem=row.problem,
        answer=row.answer,
        solution=row.solution,
        source=_first(values, "source", "data_source") or "",
        licence=_first(values, "licence", "license") or "",
        language=_first(values, "language", "lang") or language(row.problem),
        meta=meta,
    )


def to_example(row: Imported, name: str) -> Example:
    r"""The row as a conversation, its thought between think tags where it is known."""
    assert row.response is not None
    output = row.response if row.reasoning is None else thinking.join(row.reasoning, row.response)
    user, assistant = {"role": "user", "content": row.problem}, {"role": "assistant", "content": output}
    return Example(id=name, messages=(user, assistant), provenance=(name,))
