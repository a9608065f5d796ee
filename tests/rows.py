"""Rows that tests write and read."""

import dataclasses
from typing import Any

from jaxdistill.records import Chain, Usage, Verdict

_CHAIN = Chain(
    id="a/0",
    problem_id="a",
    messages=({"role": "user", "content": "6 * 7?"}, {"role": "assistant", "content": "\\boxed{42}"}),
    reasoning_kind="answer_only",
    teacher="teacher",
    prompt_hash="0",
    request_id="r",
    sample_index=0,
    finish_reason="stop",
    usage=Usage(),
    cost_usd=0.0,
    verdict=Verdict(label="correct", rule="number"),
    created=0.0,
)


def chain(**changes: Any) -> Chain:
    """A verified answer to one problem."""
    return dataclasses.replace(_CHAIN, **changes)
