"""Rows that tests write and read."""

import dataclasses
import json
from pathlib import Path
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


def log_entries(path: Path) -> list[dict[str, Any]]:
    """What the teacher logged so far, one object a request; a line that it is still writing is not among them."""
    written = path.read_text(encoding="utf-8") if path.exists() else ""
    return [json.loads(line) for line in written[: written.rfind("\n") + 1].splitlines()]
