"""The `collect` command: problems.jsonl -> chains.jsonl with verified chains, and a receipt for everything else."""

import asyncio
import collections
import dataclasses
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Literal

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.text import Text

from jaxdistill.collect.client import TeacherConfig, fulfil, read_key
from jaxdistill.collect.ledger import Failure, Ledger, Request, Response
from jaxdistill.collect.prompting import COLLECT_PROMPTS, read_prompt
from jaxdistill.collect.reply import Reply, UnreadableReply, read_reply
from jaxdistill.errors import RunError, UserError
from jaxdistill.manifest import write_config, write_manifest
from jaxdistill.progress import Progress
from jaxdistill.records import Chain, Message, Problem, Usage, Verdict, read_jsonl, write_jsonl
from jaxdistill.verify import Verifier

Reason = Literal["wrong", "truncated", "unverifiable", "failed", "not_longer"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class CollectConfig:
    """What to collect, from whom, and where it goes."""

    problems: Path  # JSON Lines of Problem
    workdir: Path  # run folder: ledger.sqlite, chains.jsonl, dropped.jsonl, config.json, manifest.json
    teacher: TeacherConfig = TeacherConfig()
    prompt: str = "long_thought.v1"  # system message, a file of collect/prompts without its .txt; empty sends none
    samples_per_problem: int = 1  # chains asked for each problem
    verify_timeout_s: float = 10.0  # seconds for one comparison with the gold answer

    def __post_init__(self) -> None:
        if self.samples_per_problem < 1:
            raise UserError(f"samples_per_problem is {self.samples_per_problem}, expected at least 1")
        if not self.verify_timeout_s > 0:
            raise UserError(f"verify_timeout_s is {self.verify_timeout_s}, expected more than 0 seconds")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Receipt:
    """Why something was dropped."""

    id: str  # of the chain that is missing
    problem_id: str
    reason: Reason
    detail: str
    request_key: str = ""  # in the ledger, which holds the raw answer; empty where nothing was asked
    usage: Usage = Usage()  # what it cost all the same


@dataclasses.dataclass(frozen=True)
class Call:
    """One planned call: `id` is problem id / sample index."""

    problem: Problem
    request: Request
    key: str

    @property
    def id(self) -> str:
        """Id of the chain it may become."""
        return f"{self.problem.id}/{self.request.sample_index}"

    def receipt(self, reason: Reason, detail: str, usage: Usage | None = None) -> Receipt:
        """The receipt if it becomes none."""
        names = {"id": self.id, "problem_id": self.problem.id, "request_key": self.key}
        return Receipt(**names, reason=reason, detail=detail, usage=usage or Usage())


def read_problems(path: Path) -> list[Problem]:
    """Reads problems.

    Raises:
      UserError: the file is missing, malformed or empty, or two problems have one id.
    """
    problems = list(read_jsonl(path, Problem))
    repeated = [name for name, count in collections.Counter(p.id for p in problems).items() if count > 1]
    if repeated:
        raise UserError(
            f"{path}: {len(repeated)} ids are not unique, such as {repeated[:3]}; give every problem its own id"
        )
    if not problems:
        raise UserError(f"{path}: holds no problem; expected at least one line")
    return problems


def plan_call(teacher: TeacherConfig, problem: Problem, messages: tuple[Message, ...], sample_index: int = 0) -> Call:
    """The call that asks for one conversation about one problem."""
    request = teacher.request(messages, sample_index)
    return Call(problem, request, request.key)


def answers(
    teacher: TeacherConfig, workdir: Path, calls: Iterable[Call], title: str
) -> list[tuple[Call, Response | Failure]]:
    """Sends what the ledger of `workdir` has no answer to, with a progress bar, and returns all outcomes in order.

    Calls with equal content are one request.
    """
    calls = list(calls)
    requests = {call.key: call.request for call in calls}
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Ledger(workdir / "ledger.sqlite") as ledger, Progress(*columns, console=Console(stderr=True)) as progress:
        ledger.record(requests.values())
        todo = len(requests.keys() & ledger.pending())
        bar = progress.add_task(title, total=len(requests), completed=len(requests) - todo)
        asyncio.run(fulfil(teacher, ledger, requests, lambda: progress.update(bar, advance=1)))
        return [(call, ledger.result(call.key)) for call in calls]


def judge(call: Call, outcome: Response | Failure, verifier: Verifier) -> tuple[Reply, Response, Verdict] | Receipt:
    """A finished answer with its correct verdict, or the receipt that says what is wrong with it."""
    if isinstance(outcome, Failure):
        return call.receipt("failed", outcome.detail)
    try:
        reply = read_reply(outcome.raw)
    except UnreadableReply as error:
        return call.receipt("failed", str(error))
    if reply.finish_reason == "length":
        detail = f"finish_reason is length after {reply.usage.output_tokens} output tokens"
        return call.receipt("truncated", detail, reply.usage)
    if reply.finish_reason != "stop":
        return call.receipt("failed", f"finish_reason is {reply.finish_reason}", reply.usage)
    assert call.problem.answer is not None
    verdict = verifier.verify(reply.text, call.problem.answer)
    if verdict.label == "correct":
        return reply, outcome, verdict
    detail = f"rule {verdict.rule}: found {verdict.extracted!r}, gold answer {call.problem.answer!r}"
    return call.receipt(verdict.label, detail, reply.usage)


def unanswerable(problems: Iterable[Problem]) -> list[Receipt]:
    """Receipts for the problems without a gold answer: asking would cost money and could prove nothing."""
    detail = "the problem has no gold answer; not asked"
    return [
        Receipt(id=p.id, problem_id=p.id, reason="unverifiable", detail=detail) for p in problems if p.answer is None
    ]


def cost_usd(teacher: TeacherConfig, usage: Usage) -> float:
    """Cost of one answer by the prices of the config."""
    return (usage.prompt_tokens * teacher.input_price_usd + usage.output_tokens * teacher.output_price_usd) / 1e6


def conclude(
    command: str,
    kept: Path,
    counts: Mapping[str, int],
    outcomes: Iterable[tuple[Call, Response | Failure]],
    dropped: Iterable[Receipt],
) -> None:
    """Prints what a command did, once all of it is written; the first of `counts` is the rows of the file `kept`.

    Raises:
      RunError: requests are still without an answer, or nothing was kept.
    """
    numbers = ", ".join(f"{count} {name}" for name, count in counts.items())
    receipts = kept.with_name("dropped.jsonl")
    line = f"{command}: {numbers}; kept in {kept}, a reason for every other in {receipts}"
    Console(stderr=True, highlight=False, soft_wrap=True).print(Text(line))
    requests = {call.key: outcome for call, outcome in outcomes}
    left = [o.detail for o in requests.values() if isinstance(o, Failure) and not o.permanent]
    if left:
        raise RunError(
            f"{len(left)} of {len(requests)} requests have no answer yet, most often because of: {_commonest(left)}; "
            "run the same command again: it asks for these alone"
        )
    if not next(iter(counts.values())):
        why = _commonest([receipt.detail for receipt in dropped])
        raise RunError(f"nothing was kept ({numbers}), most often because of: {why}; {receipts} has the reason of each")


def _commonest(details: list[str]) -> str:
    ((detail, _),) = collections.Counter(details).most_common(1)
    return " ".join(detail.split())[:300]


def main(config: CollectConfig) -> Mapping[str, int]:
    """Runs the command, or continues it; returns how many chains were verified, wrong, truncated, failed, unverifiable.

    Raises:
      UserError: problems, prompt, key or URL are not usable, or the API refuses the key or the model.
      RunError: as `conclude`; all files are written.
    """
    problems = read_problems(config.problems)
    prompt = read_prompt(config.prompt, COLLECT_PROMPTS) if config.prompt else ""
    read_key(config.teacher)  # a missing key ends the command before it writes anything
    write_config(config.workdir, config)
    system: tuple[Message, ...] = ({"role": "system", "content": prompt},) if prompt else ()
    calls = [
        plan_call(config.teacher, problem, (*system, {"role": "user", "content": problem.problem}), sample_index)
        for problem in problems
        if problem.answer is not None
        for sample_index in range(config.samples_per_problem)
    ]
    chains: list[Chain] = []
    used: dict[str, Usage] = {}  # by request: problems of equal words are one, and paid for once
    dropped = unanswerable(problems)
    with Verifier(timeout_s=config.verify_timeout_s) as verifier:
        outcomes = answers(config.teacher, config.workdir, calls, "collect")
        for call, outcome in outcomes:
            judged = judge(call, outcome, verifier)
            if isinstance(judged, Receipt):
                dropped.append(judged)
                used[call.key] = judged.usage
            else:
                chains.append(_chain(config.teacher, call, *judged))
                used[call.key] = judged[0].usage
    write_jsonl(config.workdir / "chains.jsonl", chains)
    write_jsonl(config.workdir / "dropped.jsonl", dropped)
    reasons = collections.Counter(receipt.reason for receipt in dropped)
    counts = {"verified": len(chains), **{r: reasons[r] for r in ("wrong", "truncated", "failed", "unverifiable")}}
    facts = {
        "teacher": sorted({c.teacher for c in chains}) or [config.teacher.model],
        "prompt": {"name": config.prompt, "text": prompt},
        "cost_usd": sum(cost_usd(config.teacher, usage) for usage in used.values()),
    }
    write_manifest(config.workdir, "collect", [config.problems], counts, **facts)
    conclude("collect", config.workdir / "chains.jsonl", counts, outcomes, dropped)
    return counts


def _chain(teacher: TeacherConfig, call: Call, reply: Reply, response: Response, verdict: Verdict) -> Chain:
    return Chain(
        id=call.id,
        problem_id=call.problem.id,
        messages=(*call.request.messages, reply.message),
        reasoning_kind=reply.reasoning_kind,
        teacher=reply.model or teacher.model,
        prompt_hash=call.request.prompt_hash,
        request_id=response.request_id,
        sample_index=call.request.sample_index,
        finish_reason=reply.finish_reason,
        usage=reply.usage,
        cost_usd=cost_usd(teacher, reply.usage),
        verdict=verdict,
        created=response.received,
    )
