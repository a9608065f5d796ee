"""What the demo's ablations train on: chains as they came, solutions as they are, and chains with steps left out."""

import re
from collections.abc import Iterator
from pathlib import Path

from jaxdistill import manifest, records
from jaxdistill.collect.calls import Receipt
from jaxdistill.collect.ledger import Ledger
from jaxdistill.collect.reply import read_reply
from jaxdistill.collect.request import Response
from jaxdistill.curate import examples
from jaxdistill.records import Example, Problem

HELDOUT = "heldout"  # verified chains to the held-out problems, whose loss is measured
UNVERIFIED = "unverified"  # the verified chains, and the teacher's wrong ones
SOLUTIONS = "solutions"  # those of the problems, as their source prints them
SHORTER = "shorter"  # the verified chains with every other step left out
_STEP = re.compile(r"^[a-z]\d: ")  # how the local teacher begins the work of a letter


def write(workdir: Path) -> None:
    """Writes the sets beside those of the demo, where they are not yet; each is a run folder with a manifest."""
    distilled, reformat = workdir / "distilled", workdir / "problems" / "reformat.jsonl"
    sets = {
        UNVERIFIED: (_unverified(workdir), [distilled / "examples.jsonl", distilled / "dropped.jsonl"]),
        SOLUTIONS: (_solutions(reformat), [reformat]),
        SHORTER: (_shorter(distilled), [distilled / "examples.jsonl"]),
    }
    for name, (rows, inputs) in sets.items():
        folder = workdir / name
        if not (folder / "manifest.json").is_file():
            count = records.write_jsonl(folder / "examples.jsonl", rows)
            manifest.write_manifest(folder, "examples", inputs, {"examples": count})


def _unverified(workdir: Path) -> Iterator[Example]:
    """All answers that ended, in the order of the problems: what there would be without a check of the answers."""
    distilled = workdir / "distilled"
    kept = {row.id: row for row in records.read_jsonl(distilled / "examples.jsonl", Example)}
    wrong = {r.problem_id: r for r in records.read_jsonl(distilled / "dropped.jsonl", Receipt) if r.reason == "wrong"}
    ledger = Ledger(distilled / "ledger.sqlite")
    try:
        for problem in records.read_jsonl(workdir / "problems" / "train.jsonl", Problem):
            receipt = wrong.get(problem.id)
            if receipt is None:
                yield from (kept[id_] for id_ in (f"{problem.id}/0",) if id_ in kept)
            elif isinstance(answer := ledger.result(receipt.request_key), Response):
                yield examples.example(problem, read_reply(answer.raw).text, suffix="0")
    finally:
        ledger.close()


def _solutions(path: Path) -> Iterator[Example]:
    for problem in records.read_jsonl(path, Problem):
        yield examples.example(problem, f"{problem.solution}\n\\boxed{{{problem.answer}}}", suffix="solution")


def _shorter(distilled: Path) -> Iterator[Example]:
    """Two steps in one: the student has to do every other one in its head."""
    for row in records.read_jsonl(distilled / "examples.jsonl", Example):
        *before, last = row.messages
        lines = last["content"].split("\n")
        steps = [number for number, line in enumerate(lines) if _STEP.match(line)]
        left_out = set(steps[:-1:2])  # the last one stays
        text = "\n".join(line for number, line in enumerate(lines) if number not in left_out)
        yield Example(id=row.id, messages=(*before, {**last, "content": text}), provenance=row.provenance)
