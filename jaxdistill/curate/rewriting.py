"""A campaign whose answers rewrite texts, each kept if its gate lets it pass: `refine reformat` and `translate`."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from jaxdistill.collect.calls import Call, Judged, Reason, Receipt, read_whole
from jaxdistill.collect.campaign import answered
from jaxdistill.collect.config import RunConfig, ready
from jaxdistill.collect.estimate import estimate
from jaxdistill.collect.ledger import Ledger
from jaxdistill.collect.output import Tally, conclude, costs
from jaxdistill.collect.prompting import fill, prompt_id, read_prompt
from jaxdistill.collect.reply import read_reply
from jaxdistill.collect.request import Failure, Request, Response
from jaxdistill.collect.sampling import Problems, Sampling
from jaxdistill.errors import UserError
from jaxdistill.manifest import write_manifest
from jaxdistill.records import Example, Problem, to_json, whole_file
from jaxdistill.verify import Verifier

CURATE_PROMPTS = Path(__file__).parent / "prompts"

Gate = Callable[[Problem, str, Verifier], tuple[Reason, str] | None]  # why an answer is not kept, or None


@dataclasses.dataclass(frozen=True)
class Rewritten:
    """What became of a text."""

    text: Problem
    answer: str | None  # that passed its gate
    receipt: Receipt | None  # of the last answer that did not; neither of the two: the run ended before


Finish = Callable[[Iterator[Rewritten]], Iterator[Example | Receipt]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rewriting:
    """What to ask, and which answers to keep."""

    command: str
    source: Path  # the file that the texts come from
    prompt: str  # name of a file of curate/prompts, without its .txt
    fields: Callable[[Problem], Mapping[str, str]]  # what goes where the prompt has {name}
    gate: Gate
    tries: int  # of each text, until one passes its gate

    def run(self, config: RunConfig, texts: Problems, finish: Finish) -> Mapping[str, int]:
        """Asks about the texts, or goes on; returns the numbers of examples kept, and dropped by reason.

        `finish` makes examples and receipts of what became of the texts, in their order.

        Raises:
          UserError: as `jaxdistill.collect.run.main`, or a prompt without its names.
          RunError: as `jaxdistill.collect.output.conclude`; all files are written.
        """
        template = self._template()
        teacher, prompt_name = ready(config), prompt_id(self.prompt, template)

        def asking(text: Problem, sample_index: int, max_tokens: int | None) -> Request:
            message = {"role": "user", "content": fill(template, self.fields(text))}
            return teacher.request((message,), sample_index, prompt_name, max_tokens)

        larger = config.teacher.larger_max_tokens
        sampling = Sampling(texts, asking, self.tries, 1, larger, judging=self._judge)
        if config.dry_run:
            print(estimate(teacher, config, sampling))
            return {}
        path, kept, tally = config.workdir / "examples.jsonl", 0, Tally()
        with (
            answered(self.command, teacher, sampling, config) as (ledger, account, ended),
            whole_file(path) as examples,
            whole_file(path.with_name("dropped.jsonl")) as dropped,
        ):
            for row in finish(_rewritten(sampling, ledger, tally)):
                if isinstance(row, Receipt):
                    tally.drop(row.reason, row.detail)
                    dropped.write(to_json(row) + "\n")
                else:
                    kept += 1
                    examples.write(to_json(row) + "\n")
        counts: dict[str, int] = {"kept": kept, **dict(sorted(tally.reasons.items()))}
        facts = {"prompt": {"name": prompt_name, "text": template}, **costs(account, sampling.paid(), teacher)}
        write_manifest(config.workdir, self.command, [self.source], counts, **facts)
        conclude(self.command, path, counts, tally, account, ended)
        return counts

    def _template(self) -> str:
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


def _rewritten(sampling: Sampling, ledger: Ledger, tally: Tally) -> Iterator[Rewritten]:
    for text, results in sampling.by_problem():
        answer = receipt = None
        for call, judged in results:
            tally.add(judged)
            if judged.reason is not None:
                receipt = call.receipt(judged.reason, judged.detail, judged.usage)
                continue
            response = ledger.result(call.key)
            assert isinstance(response, Response)
            answer = read_reply(response.raw).content
        yield Rewritten(text, answer, receipt if answer is None else None)
