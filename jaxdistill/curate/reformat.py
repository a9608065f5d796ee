"""Phase-1 data of the paper: each problem's own solution, rewritten by a model step by step, in more detail, boxed."""

import collections
import dataclasses
from collections.abc import Mapping
from pathlib import Path

from jaxdistill.collect.client import TeacherConfig, read_key
from jaxdistill.collect.prompting import fill, read_prompt
from jaxdistill.collect.run import Receipt, answers, conclude, cost_usd, judge, plan_call, read_problems
from jaxdistill.curate.examples import example
from jaxdistill.errors import UserError
from jaxdistill.manifest import write_config, write_manifest
from jaxdistill.records import Example, Usage, write_jsonl
from jaxdistill.verify import Verifier

CURATE_PROMPTS = Path(__file__).parent / "prompts"


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReformatConfig:
    """Which solutions to rewrite, by whom, and where the examples go."""

    problems: Path  # JSON Lines of Problem, each with a solution and an answer
    workdir: Path  # run folder: ledger.sqlite, examples.jsonl, dropped.jsonl, config.json, manifest.json
    teacher: TeacherConfig = TeacherConfig()
    prompt: str = "reformat.v1"  # user message with {problem} and {solution}, a file of curate/prompts without its .txt
    verify_timeout_s: float = 10.0  # seconds for one comparison with the gold answer

    def __post_init__(self) -> None:
        if not self.verify_timeout_s > 0:
            raise UserError(f"verify_timeout_s is {self.verify_timeout_s}, expected more than 0 seconds")


def main(config: ReformatConfig) -> Mapping[str, int]:
    """Runs the command, or continues it; returns the numbers of rewrites kept and dropped by reason.

    Kept: finished, boxed answer equal to the gold one, longer in characters than the original.

    Raises:
      UserError: as `jaxdistill.collect.run.main`, or a prompt without its two names.
      RunError: as `jaxdistill.collect.run.conclude`; all files are written.
    """
    problems = read_problems(config.problems)
    template = read_prompt(config.prompt, CURATE_PROMPTS)
    if missing := [name for name in ("{problem}", "{solution}") if name not in template]:
        raise UserError(f"prompt {config.prompt!r} has no {' and no '.join(missing)}; expected both")
    read_key(config.teacher)  # a missing key ends the command before it writes anything
    write_config(config.workdir, config)
    calls, dropped = [], []
    for problem in problems:
        if problem.answer is None or not problem.solution:
            lacks = "gold answer" if problem.answer is None else "solution"
            detail = f"the problem has no {lacks}; not asked"
            dropped.append(Receipt(id=problem.id, problem_id=problem.id, reason="unverifiable", detail=detail))
            continue
        prompt = fill(template, {"problem": problem.problem, "solution": problem.solution})
        calls.append(plan_call(config.teacher, problem, ({"role": "user", "content": prompt},)))
    examples: list[Example] = []
    used: dict[str, Usage] = {}  # by request: problems of equal words are one, and paid for once
    with Verifier(timeout_s=config.verify_timeout_s) as verifier:
        outcomes = answers(config.teacher, config.workdir, calls, "reformat")
        for call, outcome in outcomes:
            judged = judge(call, outcome, verifier)
            if isinstance(judged, Receipt):
                dropped.append(judged)
                used[call.key] = judged.usage
                continue
            reply = judged[0]
            used[call.key] = reply.usage
            original = call.problem.solution or ""
            if len(reply.content) <= len(original):
                detail = f"{len(reply.content)} characters, the original has {len(original)}"
                dropped.append(call.receipt("not_longer", detail, reply.usage))
            else:
                examples.append(example(call.problem, reply.content, suffix="reformatted"))
    write_jsonl(config.workdir / "examples.jsonl", examples)
    write_jsonl(config.workdir / "dropped.jsonl", dropped)
    reasons = collections.Counter(receipt.reason for receipt in dropped)
    names = ("wrong", "truncated", "failed", "unverifiable", "not_longer")
    counts = {"kept": len(examples), **{name: reasons[name] for name in names}}
    facts = {
        "prompt": {"name": config.prompt, "text": template},
        "cost_usd": sum(cost_usd(config.teacher, usage) for usage in used.values()),
    }
    write_manifest(config.workdir, "reformat", [config.problems], counts, **facts)
    conclude("reformat", config.workdir / "examples.jsonl", counts, outcomes, dropped)
    return counts
