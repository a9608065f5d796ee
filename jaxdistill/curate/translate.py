"""Chinese versions of conversations, each message translated by a model; kept if its gate lets all of them pass."""

import collections
import dataclasses
from collections.abc import Mapping
from pathlib import Path

from jaxdistill import thinking
from jaxdistill.collect.calls import Call, Judged, Receipt, read_whole
from jaxdistill.collect.campaign import Campaign
from jaxdistill.collect.config import LEDGER, RunConfig, ready
from jaxdistill.collect.estimate import estimate
from jaxdistill.collect.ledger import Ledger
from jaxdistill.collect.output import conclude, costs
from jaxdistill.collect.prompting import fill, prompt_id, read_prompt
from jaxdistill.collect.reply import read_reply
from jaxdistill.collect.request import Failure, Request, Response
from jaxdistill.collect.sampling import Sampling
from jaxdistill.curate.gates import translation_gate
from jaxdistill.curate.reformat import CURATE_PROMPTS
from jaxdistill.errors import UserError
from jaxdistill.manifest import write_config, write_manifest
from jaxdistill.records import Example, Message, Problem, read_jsonl, write_jsonl
from jaxdistill.verify import Verifier

_TARGET = "zh"
_TRIES = 2  # a translation that its gate refuses is asked for once more


@dataclasses.dataclass(frozen=True, kw_only=True)
class TranslateConfig(RunConfig):
    """Which conversations to translate, by whom, and what it may cost."""

    examples: Path  # JSON Lines of Example
    prompt: str = "translate_zh.v1"  # user message with {text}, a file of curate/prompts without its .txt


def main(config: TranslateConfig) -> Mapping[str, int]:
    """Runs the command, or continues it; returns the numbers of examples translated, and dropped by reason.

    Raises:
      UserError: as `jaxdistill.collect.run.main`, or a prompt without {text}.
      RunError: as `jaxdistill.collect.output.conclude`; all files are written.
    """
    examples = read_examples(config.examples)
    template = read_prompt(config.prompt, CURATE_PROMPTS)
    if "{text}" not in template:
        raise UserError(f"prompt {config.prompt!r} has no {{text}}; expected it where the text to translate goes")
    teacher = ready(config)
    prompt_name = prompt_id(config.prompt, template)

    def asking(text: Problem, sample_index: int, max_tokens: int | None) -> Request:
        content = fill(template, {"text": text.problem})
        return teacher.request(({"role": "user", "content": content},), sample_index, prompt_name, max_tokens)

    sampling = Sampling(
        [Problem(id=name, problem=text) for one in examples for name, text in _texts(one)],
        asking,
        samples=_TRIES,
        until_verified=1,
        larger_max_tokens=config.teacher.larger_max_tokens,
        judging=_judge,
    )
    if config.dry_run:
        print(estimate(teacher, config, sampling))
        return {}
    write_config(config.workdir, config)
    path = config.workdir / LEDGER
    with Ledger(path) as ledger, Verifier(timeout_s=config.verify_timeout_s) as verifier:
        campaign = Campaign(teacher, ledger, sampling, config, verifier)
        account = campaign.run("translate", path)
        texts, refused = _sort(sampling, ledger)
    kept = [translated for one in examples if (translated := _translated(one, texts))]
    firsts = [next((refused[name] for name, _ in _texts(one) if name in refused), None) for one in examples]
    dropped = [receipt for receipt in firsts if receipt]
    write_jsonl(config.workdir / "examples.jsonl", kept)
    write_jsonl(config.workdir / "dropped.jsonl", dropped)
    counts = {"kept": len(kept), **dict(sorted(collections.Counter(receipt.reason for receipt in dropped).items()))}
    facts = {"prompt": {"name": prompt_name, "text": template}, **costs(account, sampling, teacher)}
    write_manifest(config.workdir, "translate", [config.examples], counts, **facts)
    drops = [receipt.detail for receipt in dropped]
    results = sampling.in_order()
    conclude("translate", config.workdir / "examples.jsonl", counts, results, drops, account, campaign.ended)
    return counts


def read_examples(path: Path) -> list[Example]:
    """Reads conversations.

    Raises:
      UserError: the file is missing, malformed or empty.
    """
    examples = list(read_jsonl(path, Example))
    if not examples:
        raise UserError(f"{path}: holds no example; expected at least one line")
    return examples


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


def _lacks(one: Example, texts: Mapping[str, str]) -> bool:
    return any(name not in texts for name, _ in _texts(one))


def _translated(one: Example, texts: Mapping[str, str]) -> Example | None:
    if _lacks(one, texts):
        return None
    messages: list[Message] = []
    for index, message in enumerate(one.messages):
        thought, rest = texts.get(_thought(one, index)), texts.get(_rest(one, index), "")
        messages.append({"role": message["role"], "content": rest if thought is None else thinking.join(thought, rest)})
    provenance = (*one.provenance, one.id)
    return dataclasses.replace(one, id=f"{one.id}/{_TARGET}", messages=tuple(messages), provenance=provenance)


def _judge(call: Call, outcome: Response | Failure, _: Verifier) -> Judged:
    """Whether an answer is whole and translates its text."""
    reply, judged = read_whole(outcome)
    if reply is None or (refused := translation_gate(call.problem.problem, reply.content, _TARGET)) is None:
        return judged
    return dataclasses.replace(judged, reason=refused[0], detail=refused[1])


def _sort(sampling: Sampling, ledger: Ledger) -> tuple[dict[str, str], dict[str, Receipt]]:
    """Translations that passed, and the last receipt of each text that has none, by the text's name."""
    texts: dict[str, str] = {}
    refused: dict[str, Receipt] = {}
    for call, judged in sampling.in_order():
        if judged.reason is not None:
            refused[call.problem.id] = call.receipt(judged.reason, judged.detail, judged.usage)
            continue
        response = ledger.result(call.key)
        assert isinstance(response, Response)
        texts[call.problem.id] = read_reply(response.raw).content
    return texts, {name: receipt for name, receipt in refused.items() if name not in texts}
