"""Chinese versions of conversations, each message translated by a model; kept if its gate lets all of them pass."""

import dataclasses
import itertools
from collections.abc import Iterator, Mapping
from pathlib import Path

from jaxdistill import thinking
from jaxdistill.collect.calls import Reason, Receipt, malformed_line
from jaxdistill.collect.config import RunConfig
from jaxdistill.curate.gates import translation_gate
from jaxdistill.curate.rewriting import Rewriting, Rewritten
from jaxdistill.reading import Dropped, Rows, not_spoken
from jaxdistill.records import Example, Message, Problem
from jaxdistill.verify import Verifier

_TARGET = "zh"


@dataclasses.dataclass(frozen=True, kw_only=True)
class TranslateConfig(RunConfig):
    """Which conversations to translate, by whom, and what it may cost."""

    examples: Path  # JSON Lines of Example
    prompt: str = "translate_zh.v1"  # user message with {text}, a file of curate/prompts without its .txt
    strict: bool = False  # end at a malformed line, before anything is asked, instead of leaving it out


def main(config: TranslateConfig) -> Mapping[str, int]:
    """Runs the command, or continues it; returns the numbers of examples translated, and dropped by reason.

    Raises:
      UserError: the examples are missing or none, a line is malformed and `strict`; and as `Rewriting.run`.
      RunError: as `Rewriting.run`.
    """
    examples = Rows(config.examples, Example, strict=config.strict, wrong=not_spoken)
    rewriting = Rewriting(
        command="translate", source=config.examples, prompt=config.prompt, fields=_fields, gate=_gate, tries=2
    )

    def finish(rewritten: Iterator[Rewritten]) -> Iterator[Example | Receipt]:
        for row in examples.everything():
            if isinstance(row, Dropped):
                yield malformed_line(row)
                continue
            texts = list(itertools.islice(rewritten, len(_texts(row))))
            passed = {one.text.id: one.answer for one in texts if one.answer is not None}
            if translated := _translated(row, passed):
                yield translated
            elif receipt := next((one.receipt for one in texts if one.receipt), None):
                yield receipt

    return rewriting.run(config, _AllTexts(examples), finish)


class _AllTexts:
    """The texts of all examples."""

    def __init__(self, examples: Rows[Example]):
        self._examples = examples
        self._count = sum(1 for _ in self)

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[Problem]:
        return (Problem(id=name, problem=text) for one in self._examples for name, text in _texts(one))


def _fields(text: Problem) -> Mapping[str, str]:
    return {"text": text.problem}


def _gate(text: Problem, translation: str, _: Verifier) -> tuple[Reason, str] | None:
    return translation_gate(text.problem, translation, _TARGET)


def _texts(one: Example) -> list[tuple[str, str]]:
    """(name, text) of each message's thought, if it has one, and of the rest: think tags are not for translating."""
    texts: list[tuple[str, str]] = []
    for index, message in enumerate(one.messages):
        thought, rest = thinking.split(message["content"])
        parts = {_thought(one, index): thought, _rest(one, index): rest}
        texts += [(name, text) for name, text in parts.items() if text]
    return texts


def _thought(one: Example, index: int) -> str:
    return f"{one.id}@{index}/thought"


def _rest(one: Example, index: int) -> str:
    return f"{one.id}@{index}"


def _translated(one: Example, texts: Mapping[str, str]) -> Example | None:
    """The conversation in Chinese, None if one of its texts is not there."""
    if any(name not in texts for name, _ in _texts(one)):
        return None
    messages: list[Message] = []
    for index, message in enumerate(one.messages):
        thought, rest = texts.get(_thought(one, index)), texts.get(_rest(one, index), "")
        messages.append({"role": message["role"], "content": rest if thought is None else thinking.join(thought, rest)})
    provenance = (*one.provenance, one.id)
    return dataclasses.replace(one, id=f"{one.id}/{_TARGET}", messages=tuple(messages), provenance=provenance)
