"""chains.html: problems with all their answers side by side, verdict and cost, in one page that needs no network."""

import dataclasses
import itertools
from collections.abc import Iterable, Iterator
from pathlib import Path

from jaxdistill import html
from jaxdistill.collect.calls import Call, Judged
from jaxdistill.collect.ledger import Ledger
from jaxdistill.collect.prices import NANO
from jaxdistill.collect.reply import UnreadableReply, read_reply
from jaxdistill.collect.request import Response

_MOST_PROBLEMS = 200  # on the page; a browser shows no more with ease


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shown:
    """One answer on the page."""

    verified: bool
    reason: str
    detail: str
    figures: list[str]  # tokens, cost, seconds, flags
    kind: str = ""
    reasoning: str = ""
    content: str = ""


def write(
    path: Path, title: str, facts: list[str], results: Iterable[tuple[Call, Judged]], count: int, ledger: Ledger
) -> None:
    """Writes the page of the first of `count` problems; it appears whole or not at all."""
    groups = itertools.groupby(results, key=lambda result: result[0].number)
    problems = []
    for _, group in itertools.islice(groups, _MOST_PROBLEMS):
        group = list(group)
        problem = group[0][0].problem
        answers = [_show(call, judged, ledger) for call, judged in group]
        verified = sum(answer.verified for answer in answers)
        row = {"id": problem.id, "text": problem.problem, "gold": problem.answer}
        problems.append({**row, "answers": answers, "verified": verified})
    left = count - len(problems)
    shown = f"{len(problems)} problems" + (f"; {left} more are in the files beside this page" if left else "")
    template = Path(__file__).with_name("viewer.html.jinja")
    html.write(path, template, title=title, facts=facts, problems=problems, shown=shown)


def _show(call: Call, judged: Judged, ledger: Ledger) -> Shown:
    outcome = ledger.result(call.key)
    base = {"verified": judged.reason is None, "reason": judged.reason or "", "detail": judged.detail}
    if not isinstance(outcome, Response):
        return Shown(**base, figures=list(_figures(judged, None)))
    try:
        reply = read_reply(outcome.raw)
    except UnreadableReply:
        return Shown(**base, figures=list(_figures(judged, outcome)))
    return Shown(
        **base,
        figures=list(_figures(judged, outcome)),
        kind=reply.reasoning_kind.replace("_", " "),
        reasoning=reply.reasoning or "",
        content=reply.content,
    )


def _figures(judged: Judged, response: Response | None) -> Iterator[str]:
    if judged.usage.output_tokens:
        yield f"{judged.usage.output_tokens:,} tokens"
    if judged.nano:
        yield f"${judged.nano / NANO:.4f}"
    if response:
        yield f"{response.received - response.sent:.1f} s"
    yield from (flag.replace("_", " ") for flag in judged.flags)
