"""Phase-1 data of the paper: each problem's own solution, rewritten by a model step by step, in more detail, boxed."""

import collections
import dataclasses
from collections.abc import Mapping
from pathlib import Path

from jaxdistill.collect.calls import Receipt, read_problems
from jaxdistill.collect.campaign import answered
from jaxdistill.collect.config import RunConfig, ready
from jaxdistill.collect.estimate import estimate
from jaxdistill.collect.ledger import Ledger
from jaxdistill.collect.output import conclude, costs
from jaxdistill.collect.prompting import fill, prompt_id, read_prompt
from jaxdistill.collect.reply import read_reply
from jaxdistill.collect.request import Request, Response
from jaxdistill.collect.sampling import Sampling
from jaxdistill.curate.examples import example
from jaxdistill.errors import UserError
from jaxdistill.manifest import write_manifest
from jaxdistill.records import Example, Problem, write_jsonl

CURATE_PROMPTS = Path(__file__).parent / "prompts"


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReformatConfig(RunConfig):
    """Which solutions to rewrite, by whom, where the examples go, and what it may cost."""

    prompt: str = "reformat.v1"  # user message with {problem} and {solution}, a file of curate/prompts without its .txt


def main(config: ReformatConfig) -> Mapping[str, int]:
    """Runs the command, or continues it; returns the numbers of rewrites kept and dropped by reason.

    Kept: finished, boxed answer equal to the gold one, longer in characters than the original.

    Raises:
      UserError: as `jaxdistill.collect.run.main`, or a prompt without its two names.
      RunError: as `jaxdistill.collect.output.conclude`; all files are written.
    """
    problems = read_problems(config.problems)
    template = read_prompt(config.prompt, CURATE_PROMPTS)
    if missing := [name for name in ("{problem}", "{solution}") if name not in template]:
        raise UserError(f"prompt {config.prompt!r} has no {' and no '.join(missing)}; expected both")
    teacher = ready(config)
    prompt_name = prompt_id(config.prompt, template)

    def asking(problem: Problem, sample_index: int, max_tokens: int | None) -> Request:
        content = fill(template, {"problem": problem.problem, "solution": problem.solution or ""})
        return teacher.request(({"role": "user", "content": content},), sample_index, prompt_name, max_tokens)

    dropped = [receipt for problem in problems if (receipt := _unusable(problem))]
    usable = [problem for problem in problems if not _unusable(problem)]
    sampling = Sampling(usable, asking, samples=1, larger_max_tokens=config.teacher.larger_max_tokens)
    if config.dry_run:
        print(estimate(teacher, config, sampling))
        return {}
    with answered("reformat", teacher, sampling, config) as (ledger, account, ended):
        examples, receipts = _sort(sampling, ledger)
    dropped += receipts
    write_jsonl(config.workdir / "examples.jsonl", examples)
    write_jsonl(config.workdir / "dropped.jsonl", dropped)
    reasons = collections.Counter(receipt.reason for receipt in dropped)
    names = ("wrong", "truncated", "failed", "unverifiable", "not_longer")
    counts = {"kept": len(examples), **{name: reasons[name] for name in names}}
    facts = {"prompt": {"name": prompt_name, "text": template}, **costs(account, sampling, teacher)}
    write_manifest(config.workdir, "reformat", [config.problems], counts, **facts)
    drops = [receipt.detail for receipt in dropped]
    conclude("reformat", config.workdir / "examples.jsonl", counts, sampling.in_order(), drops, account, ended)
    return counts


def _unusable(problem: Problem) -> Receipt | None:
    """Why a problem is not asked about."""
    if problem.answer is not None and problem.solution:
        return None
    detail = f"the problem has no {'gold answer' if problem.answer is None else 'solution'}; not asked"
    return Receipt(id=problem.id, problem_id=problem.id, reason="unverifiable", detail=detail)


def _sort(sampling: Sampling, ledger: Ledger) -> tuple[list[Example], list[Receipt]]:
    """The rewrites to keep, and why the others are not."""
    examples: list[Example] = []
    receipts: list[Receipt] = []
    for call, judged in sampling.in_order():
        if judged.reason is not None:
            receipts.append(call.receipt(judged.reason, judged.detail, judged.usage))
            continue
        response = ledger.result(call.key)
        assert isinstance(response, Response)
        content, original = read_reply(response.raw).content, call.problem.solution or ""
        if len(content) > len(original):
            examples.append(example(call.problem, content, suffix="reformatted"))
        else:
            detail = f"{len(content)} characters, the original has {len(original)}"
            receipts.append(call.receipt("not_longer", detail, judged.usage))
    return examples, receipts
