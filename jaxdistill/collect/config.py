"""What every command that asks a teacher is told: the teacher, and how much it may cost."""

import dataclasses
import datetime
from pathlib import Path

from rich.text import Text

from jaxdistill.collect.teacher import Teacher, TeacherConfig, is_loopback, read_key
from jaxdistill.errors import UserError
from jaxdistill.progress import say

LEDGER = "ledger.sqlite"


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunConfig:
    """The part of a configuration that all commands share that ask a teacher."""

    workdir: Path  # run folder: ledger.sqlite, the rows kept, dropped.jsonl, config.json, manifest.json
    teacher: TeacherConfig = TeacherConfig()
    budget_usd: float | None = None  # hard, over all runs on this folder: worst cases are set aside before sending
    budget_tokens: int | None = None  # hard, as above; prompt and output together
    unknown_price: bool = False  # start although nobody knows the model's price; costs then count as 0
    workers: int = 1  # processes that send requests, each with up to teacher.in_flight under way
    dry_run: bool = False  # print requests, cost and time; send and write nothing
    verify_timeout_s: float = 10.0  # seconds for one comparison with the gold answer

    def __post_init__(self) -> None:
        for name in ("budget_usd", "budget_tokens"):
            if (value := getattr(self, name)) is not None and not value > 0:
                raise UserError(f"{name} is {value}, expected more than 0")
        if self.workers < 1:
            raise UserError(f"workers is {self.workers}, expected at least 1")
        if not self.verify_timeout_s > 0:
            raise UserError(f"verify_timeout_s is {self.verify_timeout_s}, expected more than 0 seconds")


def ready(config: RunConfig) -> Teacher:
    """The teacher, after everything that can be found wrong before a request is sent; prints what to know first.

    Raises:
      UserError: no key, no price, or settings that the model does not take.
    """
    teacher = Teacher(config.teacher)
    if not config.dry_run:
        read_key(config.teacher)
    if not teacher.prices.known and not is_loopback(config.teacher.base_url) and not config.unknown_price:
        raise UserError(
            f"nobody knows the price of {config.teacher.model} at {config.teacher.base_url}: neither profile "
            f"{teacher.profile.name!r} nor genai-prices; give --teacher.input-price-usd and "
            "--teacher.output-price-usd, or --unknown-price to go on without counting costs"
        )
    if config.budget_usd is not None and not teacher.prices.known:
        raise UserError(
            f"budget_usd cannot hold without a price for {config.teacher.model}; give --teacher.input-price-usd and "
            "--teacher.output-price-usd, or --budget-tokens instead"
        )
    for warning in teacher.warnings(datetime.date.today()):
        say(Text.assemble(("warning:", "bold yellow"), " ", warning))
    first = not (config.workdir / LEDGER).exists()
    if first and not is_loopback(config.teacher.base_url):
        terms = teacher.profile.terms or "read the provider's terms on training on outputs before you do"
        say(f"asking {config.teacher.model} at {config.teacher.base_url}; {terms}")
    return teacher
