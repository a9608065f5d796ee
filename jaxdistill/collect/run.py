"""The `collect` command: problems.jsonl -> chains.jsonl with verified chains, and a receipt for everything else."""

import collections
import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Literal

from jaxdistill import parquet
from jaxdistill.collect import referee, viewer
from jaxdistill.collect.board import dollars
from jaxdistill.collect.calls import Call, Judged, Receipt
from jaxdistill.collect.campaign import answered
from jaxdistill.collect.config import RunConfig, ready
from jaxdistill.collect.dialogues import Dialogues
from jaxdistill.collect.estimate import estimate
from jaxdistill.collect.ledger import Ledger
from jaxdistill.collect.output import conclude, costs
from jaxdistill.collect.prices import NANO
from jaxdistill.collect.prompting import COLLECT_PROMPTS, prompt_id, read_prompt
from jaxdistill.collect.reply import read_reply
from jaxdistill.collect.request import Request, Response
from jaxdistill.collect.sampling import Plan, Sampling, pass_rates
from jaxdistill.collect.teacher import Teacher, TeacherConfig
from jaxdistill.errors import UserError
from jaxdistill.manifest import write_manifest
from jaxdistill.records import Chain, Message, Problem, read_problems, write_jsonl


@dataclasses.dataclass(frozen=True, kw_only=True)
class CollectConfig(RunConfig):
    """What to collect, from whom, where it goes, and what it may cost."""

    problems: Path  # JSON Lines of Problem
    prompt: str = "long_thought.v1"  # system message, a file of collect/prompts without its .txt; empty sends none
    samples_per_problem: int = 1  # chains asked for each problem, at most
    until_verified: int | None = None  # stop asking about a problem after so many verified chains; None asks for all
    method: Literal["direct", "journey", "debate"] = "direct"  # one call a chain, or a dialogue (collect/dialogues.py)
    chains_format: Literal["jsonl", "parquet"] = "jsonl"  # of the verified chains; Parquet needs jaxdistill[parquet]
    judge: TeacherConfig = TeacherConfig()  # asked about answers that no rule can compare, once any of it is set
    judge_budget_usd: float | None = None  # of the judge; hard, over all runs on this folder
    judge_budget_tokens: int | None = None  # of the judge, as above; prompt and output together
    attempts: int = 3  # solutions of each dialogue, at most; it takes up to 2 * attempts - 1 calls

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("samples_per_problem", "until_verified", "attempts"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise UserError(f"{name} is {value}, expected at least 1")
        if self.until_verified is not None and self.until_verified > self.samples_per_problem:
            raise UserError(
                f"until_verified is {self.until_verified}, but samples_per_problem allows {self.samples_per_problem}"
            )
        alone = {"samples_per_problem": 1, "until_verified": None}
        given = [name for name, default in alone.items() if getattr(self, name) != default]
        given += ["teacher.larger_max_tokens"] if self.teacher.larger_max_tokens is not None else []
        given += ["judge"] if self.judges else []
        if self.method != "direct" and given:
            raise UserError(f"{' and '.join(given)} of method {self.method} cannot be set; expected with direct alone")

    @property
    def judges(self) -> bool:
        """Whether there is a judge to ask."""
        return self.judge != TeacherConfig()

    @property
    def judge_run(self) -> RunConfig:
        """What the judge's calls are told."""
        budgets = {"budget_usd": self.judge_budget_usd, "budget_tokens": self.judge_budget_tokens}
        return referee.run_config(self, teacher=self.judge, **budgets)


def main(config: CollectConfig) -> Mapping[str, int]:
    """Runs the command, or continues it; returns how many chains were verified, wrong, truncated, failed, unverifiable.

    Raises:
      UserError: problems, prompt, key, price or URL are not usable, or the API refuses the key or the model.
      RunError: as `conclude`; all files are written.
    """
    problems = read_problems(config.problems, answers=False)
    prompt = read_prompt(config.prompt, COLLECT_PROMPTS) if config.prompt else ""
    teacher = ready(config)
    if config.judges and not config.dry_run:
        ready(config.judge_run)  # refused before the teacher is asked, not after
    system: tuple[Message, ...] = ({"role": "system", "content": prompt},) if prompt else ()
    prompt_name = prompt_id(config.prompt, prompt)
    answerable = [problem for problem in problems if problem.answer is not None]
    sampling = _plan(config, answerable, teacher, system, prompt_name)
    if isinstance(sampling, Dialogues):
        prompt_name, prompt = sampling.prompt_name, sampling.prompt_text
    if config.chains_format == "parquet":
        parquet.check_installed("--chains-format parquet")
    if config.dry_run:
        print(estimate(teacher, config, sampling))
        return {}
    path = config.workdir / f"chains.{config.chains_format}"
    decided = None
    with answered("collect", teacher, sampling, config) as (ledger, account, ended):
        if config.judges and ended is None and (left := referee.undecided(sampling.in_order())):
            decided = referee.decide(left, config.judge_run)
            referee.apply(decided, sampling.results)
        kept = _write(path, _chains(teacher, sampling, ledger))
        facts = [config.teacher.model, prompt_name or "no prompt", dollars(account), teacher.prices.describe()]
        viewer.write(config.workdir / "chains.html", config.problems.stem, facts, sampling.in_order(), ledger)
    dropped = [*_unanswerable(problems), *_receipts(sampling)]
    write_jsonl(config.workdir / "dropped.jsonl", dropped)
    reasons = collections.Counter(receipt.reason for receipt in dropped)
    counts = {"verified": kept, **{r: reasons[r] for r in ("wrong", "truncated", "failed", "unverifiable")}}
    write_manifest(
        config.workdir,
        "collect",
        [config.problems],
        counts,
        teacher=config.teacher.model,
        method=config.method,
        prompt={"name": prompt_name, "text": prompt},
        flagged=collections.Counter(flag for _, judged in sampling.in_order() for flag in judged.flags),
        **costs(account, sampling, teacher),
        **({"judge": decided.facts} if decided else {}),
    )
    write_jsonl(
        config.workdir / "pass_rates.jsonl",
        ({"problem_id": name, "verified": v, "judged": n} for name, (v, n) in pass_rates(sampling.in_order()).items()),
    )
    drops = [receipt.detail for receipt in dropped]
    conclude("collect", path, counts, sampling.in_order(), drops, account, ended)
    if decided:
        decided.conclude()
    return counts


def _write(path: Path, chains: Iterator[Chain]) -> int:
    """Writes the chains and returns their number; those of an earlier run in the other format are gone."""
    if path.suffix == parquet.SUFFIX:
        path.with_suffix(".jsonl").unlink(missing_ok=True)
        return parquet.write(path, chains, Chain)
    path.with_suffix(parquet.SUFFIX).unlink(missing_ok=True)
    return write_jsonl(path, chains)


def _plan(
    config: CollectConfig, problems: list[Problem], teacher: Teacher, system: tuple[Message, ...], prompt_name: str
) -> Sampling | Dialogues:
    """The calls that the method makes."""
    if config.method != "direct":
        return Dialogues(problems, config.method, config.attempts, system, teacher.request)

    def asking(problem: Problem, sample_index: int, max_tokens: int | None) -> Request:
        messages: tuple[Message, ...] = (*system, {"role": "user", "content": problem.problem})
        return teacher.request(messages, sample_index, prompt_name, max_tokens)

    larger = config.teacher.larger_max_tokens
    return Sampling(problems, asking, config.samples_per_problem, config.until_verified, larger)


def _unanswerable(problems: list[Problem]) -> Iterator[Receipt]:
    """Receipts for the problems without a gold answer: asking would cost money and could prove nothing."""
    detail = "the problem has no gold answer; not asked"
    for problem in problems:
        if problem.answer is None:
            yield Receipt(id=problem.id, problem_id=problem.id, reason="unverifiable", detail=detail)


def _receipts(sampling: Plan) -> Iterator[Receipt]:
    for call, judged in sampling.in_order():
        if judged.reason is not None:
            yield call.receipt(judged.reason, judged.detail, judged.usage)


def _chains(teacher: Teacher, sampling: Sampling | Dialogues, ledger: Ledger) -> Iterator[Chain]:
    for call, judged in sampling.in_order():
        if judged.reason is None:
            response = ledger.result(call.key)
            assert isinstance(response, Response)
            chain = _chain(teacher, call, judged, response)
            yield sampling.told(chain) if isinstance(sampling, Dialogues) else chain


def _chain(teacher: Teacher, call: Call, judged: Judged, response: Response) -> Chain:
    reply = read_reply(response.raw)
    assert judged.verdict
    return Chain(
        id=call.id,
        problem_id=call.problem.id,
        messages=(*call.request.messages, reply.message),
        reasoning_kind=reply.reasoning_kind,
        teacher=reply.model or teacher.config.model,
        prompt_hash=call.request.prompt_hash,
        request_id=response.request_id,
        sample_index=call.request.sample_index,
        finish_reason=reply.finish_reason,
        usage=reply.usage,
        cost_usd=response.nano / NANO,
        verdict=judged.verdict,
        created=response.received,
        prompt=call.request.prompt,
        latency_s=round(response.received - response.sent, 3),
        flags=judged.flags,
    )
