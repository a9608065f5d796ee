"""One run of a sweep: its part of the examples, training, evaluation, and the line of the table that comes out."""

import hashlib
import json
import shutil
from collections.abc import Mapping
from typing import Any

import jax

from jaxdistill import hf, manifest, records, runtime, weights
from jaxdistill.checkpoint import base_of
from jaxdistill.data import chat
from jaxdistill.errors import UserError
from jaxdistill.evaluate import run as evaluate
from jaxdistill.evaluate.grade import Summary
from jaxdistill.models import decoder
from jaxdistill.records import Example
from jaxdistill.sweep.grid import Run
from jaxdistill.train import run as train


def main(run: Run, keep_model: bool = True) -> dict[str, Any]:
    """Does what is left of a run; returns its line of the table.

    Raises:
      UserError: its folder is in use or holds a run of other settings; as `train` and `evaluate`.
      PreemptedError: as `train`.
    """
    with manifest.held(run.folder):
        if (done := result_of(run)) is not None:
            return done
        runtime.start()
        history = manifest.History(run.folder)
        try:
            manifest.write_json(run.folder / "run.json", run.identity())
            if run.takes_part:
                _take_part(run)
            phases = train.main(run.train)
            (summary,) = evaluate.main(run.evaluate).values()
        finally:
            history.keep()
        line = _line(run, phases, summary) | {"wall_s": round(history.wall_s, 1), "commit": ", ".join(history.commits)}
        if not keep_model:
            for phase in run.train.phases:
                shutil.rmtree(run.folder / "train" / phase.name / "checkpoints", ignore_errors=True)
        manifest.write_json(run.folder / "result.json", line)  # last: with it the run is done
        return line


def result_of(run: Run) -> dict[str, Any] | None:
    """The line of a finished run; None while it is not.

    Raises:
      UserError: its folder holds a run of other settings, finished or not.
    """
    if not (run.folder / "run.json").is_file():
        return None
    told, now = json.loads((run.folder / "run.json").read_text(encoding="utf-8")), run.identity()
    if changed := sorted(name for name in told.keys() & now.keys() if told[name] != now[name]):
        shown = ", ".join(f"{name} {told[name]} (now {now[name]})" for name in changed[:3])
        raise UserError(
            f"{run.folder} holds a run with another {shown}; give the sweep another --workdir, or remove it"
        )
    path = run.folder / "result.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def _take_part(run: Run) -> None:
    """Writes the part of the examples of the last phase that the run is trained on, in their order.

    Which ones is decided by a hash of the seed, the size and the id: runs of other seeds and sizes draw anew, so that
    they are as independent as the table's rows are taken to be.

    Raises:
      UserError: there are too few.
    """
    path = run.train.phases[-1].examples
    if (path.parent / "manifest.json").is_file():
        return
    rows = list(records.read_jsonl(run.source, Example))
    able, size = rows, run.data_size
    if run.chain_tokens is not None:
        tokenizer = chat.load_tokenizer(base_of(run.train.model))
        able = [row for row in rows if len(chat.tokenize(tokenizer, row).tokens) <= run.chain_tokens]
    if len(able) < (size or 1):
        longest = "" if run.chain_tokens is None else f" of at most {run.chain_tokens} tokens"
        raise UserError(
            f"{run.source} has {len(able)} examples{longest}, but {run.name} takes {size or 1}; ask for less"
        )

    def draw(row: Example) -> bytes:
        return hashlib.sha256(f"{run.train.seed}/{size}/{row.id}".encode()).digest()

    chosen = {row.id for row in sorted(able, key=draw)[:size]}
    kept = [row for row in able if row.id in chosen]
    records.write_jsonl(path, kept)
    counts = {"kept": len(kept), "too_long": len(rows) - len(able), "left_out": len(able) - len(kept)}
    manifest.write_manifest(path.parent, "part", [run.source], counts, seed=run.train.seed)


def _line(run: Run, phases: Mapping[str, Mapping[str, Any]], summary: Summary) -> dict[str, Any]:
    last = phases[run.train.phases[-1].name]
    c, _ = hf.read_config(base_of(run.train.model))
    with jax.set_mesh(run.train.mesh.build()):
        parameters = weights.count(decoder.template(c))
    accuracy = summary.accuracy
    return {
        "run": run.name,
        **run.settings,
        "parameters": parameters,
        "examples": last["examples"],  # of the last phase
        "tokens": last["loss_tokens_per_epoch"],  # of them, that carry loss
        "steps": sum(phase["steps"] for phase in phases.values()),
        "heldout_loss": last["heldout_loss"],
        "accuracy": accuracy.value,
        "low": accuracy.low,
        "high": accuracy.high,
        "error": 1 - accuracy.value,
        "average_tokens": summary.tokens.average,
    }
