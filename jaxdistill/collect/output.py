"""What a run writes: a summary line on standard error, and the errors that end it once everything is on the disk."""

import collections
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxdistill.collect.board import dollars
from jaxdistill.collect.calls import Judged
from jaxdistill.collect.campaign import INTERRUPTED, OVER_BUDGET
from jaxdistill.collect.ledger import Account
from jaxdistill.collect.prices import NANO
from jaxdistill.collect.spare import DISK_FULL
from jaxdistill.collect.teacher import Teacher
from jaxdistill.errors import RunError, UserError, disk_full
from jaxdistill.progress import say

_DETAILS = 1000  # different ones that are counted


class Tally:
    """Counts results and drops as they are written."""

    def __init__(self):
        self.asked, self.left = 0, 0  # results; those of them without an answer yet
        self.reasons: collections.Counter[str] = collections.Counter()  # of what was dropped
        self.flags: collections.Counter[str] = collections.Counter()
        self._details: dict[bool, collections.Counter[str]] = collections.defaultdict(collections.Counter)

    def add(self, judged: Judged) -> None:
        """Counts a result."""
        self.asked += 1
        self.flags.update(judged.flags)
        if judged.again:
            self.left += 1
            self._count(True, judged.detail)

    def drop(self, reason: str, detail: str) -> None:
        """Counts a receipt."""
        self.reasons[reason] += 1
        self._count(False, detail)

    def _count(self, again: bool, detail: str) -> None:
        details = self._details[again]
        if detail in details or len(details) < _DETAILS:
            details[detail] += 1

    def commonest(self, again: bool) -> str:
        """The detail of most drops, or of most results without an answer yet."""
        ((detail, _),) = self._details[again].most_common(1) or [("there was nothing to ask", 0)]
        return " ".join(detail.split())[:300]


def costs(account: Account, paid: int, teacher: Teacher) -> dict[str, Any]:
    """For the manifest: what these calls cost (`paid`), what the whole folder did, and by whose prices."""
    return {
        "cost_usd": paid / NANO,
        "spent_usd": account.spent_nano / NANO,  # by all runs on the folder, calls of other settings included
        "spent_tokens": account.spent_tokens,
        "lost_usd_at_most": account.lost_nano / NANO,
        "prices": teacher.prices.describe(),
    }


def conclude(
    command: str,
    kept: Path,
    counts: Mapping[str, int],
    tally: Tally,
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
    if tally.left:
        raise RunError(
            f"{tally.left} of {tally.asked} requests have no answer yet, most often because of: "
            f"{tally.commonest(again=True)}; run the same command again: it asks for these alone"
        )
    if not next(iter(counts.values())):
        raise RunError(
            f"nothing was kept ({numbers}), most often because of: {tally.commonest(again=False)}; "
            f"{receipts} has the reason of each"
        )
