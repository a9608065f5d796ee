"""Completions from an API, through the collect client: every answer is in a ledger before anything else happens."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jaxdistill import records
from jaxdistill.collect.calls import Call, Judged, read_whole
from jaxdistill.collect.campaign import answered
from jaxdistill.collect.config import LEDGER, RunConfig, ready
from jaxdistill.collect.ledger import Ledger
from jaxdistill.collect.output import Tally, conclude
from jaxdistill.collect.prices import NANO
from jaxdistill.collect.reply import Reply, read_reply
from jaxdistill.collect.request import Failure, Request, Response
from jaxdistill.collect.sampling import Sampling
from jaxdistill.evaluate.plan import Plan, Wanted
from jaxdistill.progress import say
from jaxdistill.records import Completion, Problem
from jaxdistill.verify import Verifier

CALLS = "calls"  # the ledger, and the configuration of the calls


def ask(plan: Plan, left: Wanted) -> Iterator[Completion]:
    """Completions of all answers that came; an answer that was cut off is one, a request that failed is none.

    Receipts of the failed ones are in `dropped.jsonl`.

    Raises:
      UserError: as `jaxdistill.collect.config.ready`, or the API refuses to go on; after all completions.
      RunError: requests are without an answer, over the budget or interrupted; after all completions.
    """
    config = run_config(plan)
    teacher = ready(config)

    def asking(problem: Problem, sample_index: int, max_tokens: int | None) -> Request:
        request = teacher.request(plan.messages(problem), sample_index, max_tokens=max_tokens)
        if not plan.config.endpoint_seeds:
            return request
        seed = plan.seed(plan.id(problem, sample_index))
        return dataclasses.replace(request, parameters={**request.parameters, "seed": seed})

    sampling = Sampling(plan.problems, asking, plan.config.samples, judging=_judge)
    completions: list[Completion] = []
    uncounted, receipts, tally = 0, [], Tally()
    with answered(f"evaluate {plan.name}", teacher, sampling, config) as (ledger, account, ended):
        for call, judged in sampling.in_order():
            tally.add(judged)
            if judged.reason is not None:
                tally.drop(judged.reason, judged.detail)
                receipts.append(call.receipt(judged.reason, judged.detail, judged.usage))
                continue
            response = ledger.result(call.key)
            assert isinstance(response, Response)
            id_ = plan.id(call.problem, call.request.sample_index)
            uncounted += not judged.usage.output_tokens
            if id_ in left:
                completions.append(_completion(plan, call, read_reply(response.raw)))
    records.write_jsonl(plan.folder / "dropped.jsonl", receipts)
    yield from completions
    if uncounted:
        say(f"{plan.name}: {uncounted} answers came without a count of their tokens, and count as 0")
    counts = {"answered": tally.asked - len(receipts), "failed": len(receipts)}
    conclude(f"evaluate {plan.name}", plan.folder / "completions.jsonl", counts, tally, account, ended)


def run_config(plan: Plan) -> RunConfig:
    """What the collect client is told."""
    config = plan.config
    return RunConfig(
        workdir=plan.folder / CALLS,
        teacher=config.endpoint,
        budget_usd=config.budget_usd,
        budget_tokens=config.budget_tokens,
        unknown_price=config.unknown_price,
    )


def spent_usd(folder: Path) -> float:
    """What all calls of a folder with a ledger cost; 0 where none were made."""
    path = folder / LEDGER
    if not path.is_file():
        return 0.0
    with Ledger(path) as ledger:
        return ledger.account().spent_nano / NANO


def _judge(call: Call, outcome: Response | Failure, verifier: Verifier) -> Judged:
    """Only whether there is an answer: grading comes later, for all models alike, and knows what was cut off."""
    _, judged = read_whole(outcome)
    return dataclasses.replace(judged, reason=None) if judged.reason == "truncated" else judged


def _completion(plan: Plan, call: Call, reply: Reply) -> Completion:
    thought = _thinking_tokens(reply)
    settings: dict[str, Any] = plan.settings(call.problem)
    index = call.request.sample_index
    id_ = plan.id(call.problem, index)
    assert reply.finish_reason != "content_filter"  # which is no answer
    return Completion(
        id=id_,
        task=plan.task.name,
        item_id=call.problem.id,
        sample_index=index,
        seed=plan.seed(id_),
        settings=settings,
        text=reply.text,
        thinking_tokens=thought,
        answer_tokens=reply.usage.output_tokens - thought,
        finish_reason=reply.finish_reason,
    )


def _thinking_tokens(reply: Reply) -> int:
    """As the API counts them; where it shows its reasoning and does not count it, the share of the characters."""
    usage = reply.usage
    if usage.reasoning_tokens or not reply.reasoning:
        return min(usage.reasoning_tokens, usage.output_tokens)
    return round(usage.output_tokens * len(reply.reasoning) / (len(reply.reasoning) + len(reply.content)))
