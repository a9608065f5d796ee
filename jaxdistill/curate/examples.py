"""Chains and problems -> conversations to train on. One text form for long thoughts, everywhere."""

from collections.abc import Iterable, Iterator

from jaxdistill.collect.reply import join_reasoning
from jaxdistill.errors import UserError
from jaxdistill.records import Chain, Example, Problem


def chains_to_examples(chains: Iterable[Chain]) -> Iterator[Example]:
    r"""One example a chain, in their order.

    The assistant's content is `<think>\n{reasoning}\n</think>\n{answer}` where the chain holds reasoning, else the
    answer as it is. System messages, which asked the teacher to think aloud, are left out: the student thinks unasked.
    """
    for chain in chains:
        *prompt, last = chain.messages
        reasoning = last.get("reasoning_content")
        content = last["content"].strip() if reasoning is None else join_reasoning(reasoning, last["content"])
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
