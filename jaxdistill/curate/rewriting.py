"""A campaign whose answers rewrite texts, each kept if its gate lets it pass: `refine reformat` and `translate`."""

import collections
import dataclasses
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from jaxdistill.collect.calls import Call, Judged, Reason, Receipt, read_whole
from jaxdistill.collect.campaign import answered
from jaxdistill.collect.config import RunConfig, ready
from jaxdistill.collect.estimate import estimate
from jaxdistill.collect.output import conclude, costs
from jaxdistill.collect.prompting import fill, prompt_id, read_prompt
from jaxdistill.collect.reply import read_reply
from jaxdistill.collect.request import Failure, Request, Response
from jaxdistill.collect.sampling import Sampling
from jaxdistill.errors import UserError
from jaxdistill.manifest import write_manifest
from jaxdistill.records import Example, Problem, write_jsonl
from jaxdistill.verify import Verifier

CURATE_PROMPTS = Path(__file__).parent / "prompts"

Gate = Callable[[Problem, str, Verifier], tuple[Reason, str] | None]  # why an answer is not kept, or None
Finish = Callable[[dict[str, str], dict[str, Receipt]], tuple[list[Example], list[Receipt]]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rewriting:
    """What to ask, and which answers to keep."""

    command: str
    source: Path  # the file that the texts come from
    prompt: str  # name of a file of curate/prompts, without its .txt
    fields: Callable[[Problem], Mapping[str, str]]  # what goes where the prompt has {name}
    gate: Gate
    tries: int  # of each text, until one passes its gate

    def run(self, config: RunConfig, texts: Iterable[Problem], finish: Finish) -> Mapping[str, int]:
        """Asks about the texts, or goes on; returns the numbers of examples kept, and dropped by reason.

        `finish` makes examples and receipts of the answers that passed and of the last receipts of the other texts,
        both by id of the text.

        Raises:
          UserError: as `jaxdistill.collect.run.main`, or a prompt without its names.
          RunError: as `jaxdistill.collect.output.conclude`; all files are written.
        """
        texts = list(texts)
        template = self._template(texts)
        teacher, prompt_name = ready(config), prompt_id(self.prompt, template)

        def asking(text: Problem, sample_index: int, max_tokens: int | None) -> Request:
            message = {"role": "user", "content": fill(template, self.fields(text))}
            return teacher.request((message,), sample_index, prompt_name, max_tokens)

        larger = config.teacher.larger_max_tokens
        sampling = Sampling(texts, asking, self.tries, 1, larger, judging=self._judge)
        if config.dry_run:
            print(estimate(teacher, config, sampling))
            return {}
        passed: dict[str, str] = {}
        refused: dict[str, Receipt] = {}
        with answered(self.command, teacher, sampling, config) as (ledger, account, ended):
            for call, judged in sampling.in_order():
                if judged.reason is not None:
                    refused[call.problem.id] = call.receipt(judged.reason, judged.detail, judged.usage)
                    continue
                response = ledger.result(call.key)
                assert isinstance(response, Response)
                passed[call.problem.id] = read_reply(response.raw).content
        kept, dropped = finish(passed, {name: receipt for name, receipt in refused.items() if name not in passed})
        path = config.workdir / "examples.jsonl"
        write_jsonl(path, kept)
        write_jsonl(path.with_name("dropped.jsonl"), dropped)
        reasons = collections.Counter(receipt.reason for receipt in dropped)
        counts: dict[str, int] = {"kept": len(kept), **dict(sorted(reasons.items()))}
        facts = {"prompt": {"name": prompt_name, "text": template}, **costs(account, sampling, teacher)}
        write_manifest(config.workdir, self.command, [self.source], counts, **facts)
        drops = [receipt.detail for receipt in dropped]
        conclude(self.command, path, counts, sampling.in_order(), drops, account, ended)
        return counts

    def _template(self, texts: list[Problem]) -> str:
        template = read_prompt(self.prompt, CURATE_PROMPTS)
        names = [f"{{{name}}}" for name in self.fields(Problem(id="", problem=""))]
        if missing := [name for name in names if name not in template]:
            raise UserError(f"prompt {self.prompt!r} has no {' and no '.join(missing)}; expected {' and '.join(names)}")
        return template

    def _judge(self, call: Call, outcome: Response | Failure, verifier: Verifier) -> Judged:
        """Whether an answer is whole and passes its gate."""
        reply, whole = read_whole(outcome)
        if reply is None or (refused := self.gate(call.problem, reply.content, verifier)) is None:
            return whole
        return dataclasses.replace(whole, reason=refused[0], detail=refused[1])
