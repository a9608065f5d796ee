"""Chinese versions of conversations, each message translated by a model; kept if its gate lets all of them pass."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path

from jaxdistill import thinking
from jaxdistill.collect.calls import Reason, Receipt
from jaxdistill.collect.config import RunConfig
from jaxdistill.curate.gates import translation_gate
from jaxdistill.curate.rewriting import Rewriting
from jaxdistill.errors import UserError
from jaxdistill.records import Example, Message, Problem, read_jsonl
from jaxdistill.verify import Verifier

_TARGET = "zh"


@dataclasses.dataclass(frozen=True, kw_only=True)
class TranslateConfig(RunConfig):
    """Which conversations to translate, by whom, and what it may cost."""

    examples: Path  # JSON Lines of Example
    prompt: str = "translate_zh.v1"  # user message with {text}, a file of curate/prompts without its .txt


def main(config: TranslateConfig) -> Mapping[str, int]:
    """Runs the command, or continues it; returns the numbers of examples translated, and dropped by reason.

    Raises:
      UserError: the examples are missing, malformed or none; and as `Rewriting.run`.
      RunError: as `Rewriting.run`.
    """
    examples = list(read_jsonl(config.examples, Example))
    if not examples:
        raise UserError(f"{config.examples}: holds no example; expected at least one line")
    rewriting = Rewriting(
        command="translate", source=config.examples, prompt=config.prompt, fields=_fields, gate=_gate, tries=2
    )

    def finish(passed: dict[str, str], refused: dict[str, Receipt]) -> tuple[list[Example], list[Receipt]]:
        kept = [translated for one in examples if (translated := _translated(one, passed))]
        firsts = (next((refused[name] for name, _ in _texts(one) if name in refused), None) for one in examples)
        return kept, [receipt for receipt in firsts if receipt]

    texts = [Problem(id=name, problem=text) for one in examples for name, text in _texts(one)]
    return rewriting.run(config, texts, finish)


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
