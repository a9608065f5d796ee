"""Chains and problems -> conversations to train on. One text form for long thoughts, everywhere."""

import dataclasses
import itertools
from collections.abc import Iterable, Iterator
from pathlib import Path

from jaxdistill import thinking
from jaxdistill.errors import UserError
from jaxdistill.manifest import write_config, write_manifest
from jaxdistill.progress import say
from jaxdistill.reading import Dropped, Malformed, not_spoken, read_rows
from jaxdistill.records import Chain, Example, Problem, write_jsonl


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExamplesConfig:
    """Chains to be made into training examples."""

    chains: Path  # JSON Lines or Parquet of Chain, as `jaxdistill collect` writes them
    workdir: Path  # run folder: examples.jsonl, config.json, manifest.json
    strict: bool = False  # end at the first malformed line instead of leaving it out


def main(config: ExamplesConfig) -> int:
    """Writes examples.jsonl and returns the number of examples.

    Raises:
      UserError: the chains are missing or none, or a line is malformed and `strict`.
    """
    malformed = Malformed(config.strict)
    rows = read_rows(config.chains, Chain, malformed, not_spoken)
    chains = (row for row in rows if not isinstance(row, Dropped))
    first = next(chains, None)
    if first is None:
        raise UserError(
            f"{config.chains}: holds no chain that can be read; expected at least one line, as `jaxdistill collect` "
            "writes them"
        )
    path = config.workdir / "examples.jsonl"
    count = write_jsonl(path, chains_to_examples(itertools.chain([first], chains)))
    write_config(config.workdir, config)
    write_manifest(config.workdir, "examples", [config.chains], {"examples": count, **malformed.counts})
    say(f"examples: {count} from {config.chains} in {path}")
    return count


def chains_to_examples(chains: Iterable[Chain]) -> Iterator[Example]:
    r"""One example a chain, in their order.

    The assistant's content is `<think>\n{reasoning}\n</think>\n{answer}` where the chain holds reasoning, else the
    answer as it is. System messages, which asked the teacher to think aloud, are left out: the student thinks unasked.
    """
    for chain in chains:
        *prompt, last = chain.messages
        reasoning = last.get("reasoning_content")
        content = last["content"].strip() if reasoning is None else thinking.join(reasoning, last["content"])
        yield Example(
            id=chain.id,
            messages=(*(m for m in prompt if m["role"] != "system"), {"role": "assistant", "content": content}),
            provenance=(chain.id,),
        )


def answers_only(problems: Iterable[Problem]) -> Iterator[Example]:
    r"""The ablation: the assistant says `\boxed{answer}` and nothing else.

    Raises:
      UserError: a problem has no answer.
    """
    for problem in problems:
        if problem.answer is None:
            raise UserError(f"problem {problem.id!r} has no answer; drop it before making examples of answers only")
        yield example(problem, f"\\boxed{{{problem.answer}}}", suffix="answer")


def example(problem: Problem, assistant: str, suffix: str) -> Example:
    """One question and one answer; the id is the problem's id and a suffix."""
    return Example(
        id=f"{problem.id}/{suffix}",
        messages=({"role": "user", "content": problem.problem}, {"role": "assistant", "content": assistant}),
        provenance=(problem.id,),
    )
