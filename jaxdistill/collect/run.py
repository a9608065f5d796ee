"""The `collect` command: problems.jsonl -> chains.jsonl with verified chains, and a receipt for everything else."""

import contextlib
import dataclasses
import itertools
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

from jaxdistill import parquet
from jaxdistill.collect import referee, viewer
from jaxdistill.collect.board import dollars
from jaxdistill.collect.calls import Call, Judged, Receipt, malformed_line
from jaxdistill.collect.campaign import answered
from jaxdistill.collect.config import RunConfig, ready
from jaxdistill.collect.dialogues import Dialogues
from jaxdistill.collect.estimate import Judge, estimate
from jaxdistill.collect.ledger import Ledger
from jaxdistill.collect.output import Tally, conclude, costs
from jaxdistill.collect.prices import NANO
from jaxdistill.collect.prompting import COLLECT_PROMPTS, prompt_id, read_prompt
from jaxdistill.collect.reply import read_reply
from jaxdistill.collect.request import Request, Response
from jaxdistill.collect.sampling import Problems, Sampling
from jaxdistill.collect.teacher import Teacher, TeacherConfig
from jaxdistill.errors import UserError
from jaxdistill.manifest import write_manifest
from jaxdistill.reading import Dropped, Rows
from jaxdistill.records import Chain, Message, Problem, to_json, whole_file, write_jsonl


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
    strict: bool = False  # end at a malformed line, before anything is asked, instead of leaving it out

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
        common = {name: getattr(self, name) for name in ("unknown_price", "verify_timeout_s", "dry_run")}
        budgets = {"budget_usd": self.judge_budget_usd, "budget_tokens": self.judge_budget_tokens}
        return referee.run_config(self.workdir, teacher=self.judge, **budgets, **common)


def main(config: CollectConfig) -> Mapping[str, int]:
    """Runs the command, or continues it; returns how many chains were verified, wrong, truncated, failed, unverifiable.

    Memory: some problems that are under way, and 8 bytes for each.

    Raises:
      UserError: problems, prompt, key, price or URL are not usable, or the API refuses the key or the model.
      RunError: as `conclude`; all files are written.
    """
    problems = Rows(config.problems, Problem, strict=config.strict, wanted=_answerable, as_kept=_as_asked, unique=True)
    prompt = read_prompt(config.prompt, COLLECT_PROMPTS) if config.prompt else ""
    teacher = ready(config)
    judge = None
    if config.judges:
        judge = _judge(config, ready(config.judge_run))  # refused before the teacher is asked, not after
    system: tuple[Message, ...] = ({"role": "system", "content": prompt},) if prompt else ()
    prompt_name = prompt_id(config.prompt, prompt)
    sampling = _plan(config, problems, teacher, system, prompt_name)
    if isinstance(sampling, Dialogues):
        prompt_name, prompt = sampling.prompt_name, sampling.prompt_text
    if config.chains_format == "parquet":
        parquet.check_installed("--chains-format parquet")
    if config.dry_run:
        print(estimate(teacher, config, sampling, judge))
        return {}
    path = config.workdir / f"chains.{config.chains_format}"
    decided = None
    with answered("collect", teacher, sampling, config) as (ledger, account, ended):
        if isinstance(sampling, Sampling) and config.judges and ended is None:
            undecided = referee.Undecided(sampling)
            if len(undecided):
                decided = referee.decide(undecided, config.judge_run)
                referee.apply(decided, undecided, sampling)
        with _Files(config.workdir) as files:
            files.unasked(problems)
            kept = _write(path, _chains(teacher, sampling, ledger, files))
        facts = [config.teacher.model, prompt_name or "no prompt", dollars(account), teacher.prices.describe()]
        viewer.write(
            config.workdir / "chains.html", config.problems.stem, facts, sampling.in_order(), files.asked, ledger
        )
    reasons = files.tally.reasons
    counts = {"verified": kept, **{r: reasons[r] for r in ("wrong", "truncated", "failed", "unverifiable")}}
    counts |= {"malformed": problems.malformed} if problems.malformed else {}
    write_manifest(
        config.workdir,
        "collect",
        [config.problems],
        counts,
        teacher=config.teacher.model,
        method=config.method,
        prompt={"name": prompt_name, "text": prompt},
        flagged=files.tally.flags,
        **costs(account, sampling.paid(), teacher),
        **({"judge": decided.facts} if decided else {}),
    )
    conclude("collect", path, counts, files.tally, account, ended)
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
    config: CollectConfig, problems: Problems, teacher: Teacher, system: tuple[Message, ...], prompt_name: str
) -> Sampling | Dialogues:
    """The calls that the method makes."""
    if config.method != "direct":
        return Dialogues(problems, config.method, config.attempts, system, teacher.request)

    def asking(problem: Problem, sample_index: int, max_tokens: int | None) -> Request:
        messages: tuple[Message, ...] = (*system, {"role": "user", "content": problem.problem})
        return teacher.request(messages, sample_index, prompt_name, max_tokens)

    larger = config.teacher.larger_max_tokens
    return Sampling(problems, asking, config.samples_per_problem, config.until_verified, larger)


def _answerable(problem: Problem) -> bool:
    """Whether there is a gold answer: without one, asking would cost money and could prove nothing."""
    return problem.answer is not None


def _as_asked(problem: Problem) -> Problem:
    """What is needed of a problem."""
    return dataclasses.replace(problem, solution=None, meta={})


def _judge(config: CollectConfig, judge: Teacher) -> Judge:
    """What its questions may come to: one about each sample."""

    def at_worst(call: Call) -> list[tuple[int, int]]:
        samples = config.samples_per_problem if call.request.sample_index == 0 else 0
        return samples * [referee.at_worst(judge, call.problem)] if samples else []

    return Judge(judge, at_worst)


class _Files:
    """The receipts and the pass rates, written beside the chains in one go through the results."""

    def __init__(self, workdir: Path):
        self.tally, self.asked = Tally(), 0  # problems with results
        self._stack = contextlib.ExitStack()
        self._dropped = self._stack.enter_context(whole_file(workdir / "dropped.jsonl"))
        self._rates = self._stack.enter_context(whole_file(workdir / "pass_rates.jsonl"))

    def __enter__(self) -> "_Files":
        return self

    def __exit__(self, *error: Any) -> None:
        self._stack.__exit__(*error)

    def unasked(self, problems: Rows[Problem]) -> None:
        """Receipts for what was not asked about: malformed lines, and problems without a gold answer."""
        for row in problems.everything() if problems.malformed or problems.unwanted else ():
            if isinstance(row, Dropped):
                self._drop(malformed_line(row))
            elif not problems.wanted(row):
                detail = "the problem has no gold answer; not asked"
                self._drop(Receipt(id=row.id, problem_id=row.id, reason="unverifiable", detail=detail))

    def results(self, results: Iterable[tuple[Call, Judged]]) -> Iterator[tuple[Call, Judged]]:
        """The results that were verified; receipts of the others, and the rates of all problems, are written."""
        for _, group in itertools.groupby(results, key=lambda result: result[0].number):
            of_problem = list(group)
            self.asked += 1
            verified = judged_ones = 0
            for call, judged in of_problem:
                self.tally.add(judged)
                verified += judged.reason is None
                judged_ones += not judged.again  # one without an answer yet does not count
                if judged.reason is None:
                    yield call, judged
                else:
                    self._drop(call.receipt(judged.reason, judged.detail, judged.usage))
            name = of_problem[0][0].problem.id
            self._rates.write(to_json({"problem_id": name, "verified": verified, "judged": judged_ones}) + "\n")

    def _drop(self, receipt: Receipt) -> None:
        self.tally.drop(receipt.reason, receipt.detail)
        self._dropped.write(to_json(receipt) + "\n")


def _chains(teacher: Teacher, sampling: Sampling | Dialogues, ledger: Ledger, files: _Files) -> Iterator[Chain]:
    for call, judged in files.results(sampling.in_order()):
        response = ledger.result(call.key)
        assert isinstance(response, Response)
        chain = _chain(teacher, call, judged, response)
        yield sampling.told(call, judged, chain) if isinstance(sampling, Dialogues) else chain


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
