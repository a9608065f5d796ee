"""What a run writes: a summary line on standard error, and the errors that end it once everything is on the disk."""

import collections
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from jaxdistill.collect.board import dollars
from jaxdistill.collect.calls import Call, Judged
from jaxdistill.collect.campaign import INTERRUPTED, OVER_BUDGET
from jaxdistill.collect.ledger import Account
from jaxdistill.collect.prices import NANO
from jaxdistill.collect.sampling import Plan
from jaxdistill.collect.spare import DISK_FULL
from jaxdistill.collect.teacher import Teacher
from jaxdistill.errors import RunError, UserError, disk_full
from jaxdistill.progress import say


def costs(account: Account, sampling: Plan, teacher: Teacher) -> dict[str, Any]:
    """For the manifest: what these calls cost, what the whole folder did, and by whose prices."""
    return {
        "cost_usd": sum(sampling.nano.values()) / NANO,
        "spent_usd": account.spent_nano / NANO,  # by all runs on the folder, calls of other settings included
        "spent_tokens": account.spent_tokens,
        "lost_usd_at_most": account.lost_nano / NANO,
        "prices": teacher.prices.describe(),
    }


def conclude(
    command: str,
    kept: Path,
    counts: Mapping[str, int],
    results: Iterable[tuple[Call, Judged]],
    drops: Iterable[str],
    account: Account,
    ended: str | None,
) -> None:
    """Prints what a command did, once all of it is written; the first of `counts` is the rows of the file `kept`.

    Raises:
      UserError: the API refused to go on.
      RunError: requests are still without an answer, or nothing was kept.
      OSError: the disk became full.
    """
    numbers = ", ".join(f"{count} {name}" for name, count in counts.items())
    receipts = kept.with_name("dropped.jsonl")
    line = f"{command}: {numbers}; kept in {kept}, a reason for every other in {receipts}; {dollars(account)}"
    say(line)
    if ended == INTERRUPTED:
        raise RunError("interrupted; run the same command again to go on")
    if ended == DISK_FULL:
        raise disk_full(kept.parent)
    if ended == OVER_BUDGET:
        raise RunError(
            f"the budget leaves no room for the next request at its worst ({dollars(account)}; "
            f"{account.spent_tokens:,} tokens); raise it and run the same command again: what was answered is kept"
        )
    if ended:
        raise UserError(ended)
    requests = {call.key: judged for call, judged in results}
    left = [judged.detail for judged in requests.values() if judged.again]
    if left:
        raise RunError(
            f"{len(left)} of {len(requests)} requests have no answer yet, most often because of: {_commonest(left)}; "
            "run the same command again: it asks for these alone"
        )
    if not next(iter(counts.values())):
        raise RunError(
            f"nothing was kept ({numbers}), most often because of: {_commonest(list(drops))}; "
            f"{receipts} has the reason of each"
        )


def _commonest(details: list[str]) -> str:
    ((detail, _),) = collections.Counter(details).most_common(1)
    return " ".join(detail.split())[:300]
