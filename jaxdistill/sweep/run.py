"""`jaxdistill sweep`: a grid of runs, each in a process of its own, here or as tasks of a job, and their table."""

import collections
import contextlib
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, cast

from jaxdistill import manifest
from jaxdistill.demo.material import Material
from jaxdistill.errors import MISTAKE, PREEMPTED, PreemptedError, RunError, UserError
from jaxdistill.launch import run as launch
from jaxdistill.launch.run import Array, LaunchConfig
from jaxdistill.progress import say
from jaxdistill.sweep import one, table
from jaxdistill.sweep.config import SweepConfig
from jaxdistill.sweep.grid import Run, chosen, runs_of

_END_LINES = 15  # of the log of a run that failed, shown
_POLL_S = 0.5


def main(config: SweepConfig, words: Sequence[str]) -> list[dict[str, Any]]:
    """Does what is missing of a sweep, or of the one run it is asked for; returns the lines of the table.

    Args:
      words: of the command line that gave the configuration; runs are started with the same ones, and a name.

    Raises:
      UserError: two runs would be one, a folder holds a run of other settings, or a run is a mistake.
      RunError: runs failed; all others are done.
      PreemptedError: after SIGTERM, once the run that was at work has saved.
    """
    if config.run:
        run = chosen(config)
        return [one.main(run, config.keep_models)]
    with manifest.held(config.workdir):
        return _all(config, [*words])


def _all(config: SweepConfig, words: list[str]) -> list[dict[str, Any]]:
    runs = runs_of(config)
    names = collections.Counter(run.name for run in runs)
    if twice := [name for name, count in names.items() if count > 1]:
        raise UserError(
            f"{len(twice)} runs would have one name, such as {twice[0]}; give values that differ when written"
        )
    missing = [run for run in runs if one.result_of(run) is None]
    manifest.write_config(config.workdir, config)
    say(f"{len(runs)} runs, {len(runs) - len(missing)} of them done; {config.workdir}")
    failed: list[str] = []
    if missing and not config.gather:
        if config.material is not None:
            Material(config.material).all()
        if config.target != "here":
            _write_job(config, words, missing)
        else:
            failed = _run_here(config, words, missing, len(runs))
    lines = [line for run in runs if (line := one.result_of(run)) is not None]
    if lines:
        table.write(config.workdir, lines)
        table.show(config.workdir.name, lines)
        say(f"{len(lines)} of {len(runs)} runs in {config.workdir / 'table.jsonl'} and table.csv")
    results = [run.folder / "result.json" for run in runs if (run.folder / "result.json").is_file()]
    manifest.write_manifest(config.workdir, "sweep", results, {"runs": len(runs), "done": len(lines)})
    if failed:
        raise RunError(f"{len(failed)} of {len(runs)} runs failed: {', '.join(failed)}; run the same command again")
    return lines


def _run_here(config: SweepConfig, words: list[str], missing: list[Run], count: int) -> list[str]:
    """Runs one after another; returns the names of those that failed."""
    failed = []
    for number, run in enumerate(missing, start=1 + count - len(missing)):
        _wait_for(run)
        line = one.result_of(run)
        if line is None:
            command = [sys.executable, "-m", "jaxdistill", "sweep", *words, "--run", run.name]
            log = run.folder / "log.txt"
            log.parent.mkdir(parents=True, exist_ok=True)
            status = _run(command, log)
            line = one.result_of(run)
            if line is None:
                say(f"{number}/{count} {run.name}: exit code {status}; the end of {log}:")
                said = log.read_text(encoding="utf-8", errors="replace").splitlines()[-_END_LINES:]
                say("\n".join(f"  {text}" for text in said))
                if status in (PREEMPTED, -signal.SIGTERM):
                    raise PreemptedError(f"preempted in {run.name}; run the same command again to go on")
                if status == MISTAKE:
                    raise UserError(f"{run.name} is a mistake (above), and the next runs would be; mend it, and go on")
                failed.append(run.name)
                continue
        say(f"{number}/{count} {run.name}: accuracy {line['accuracy']:.1%}, {line['wall_s']:.0f} s")
    return failed


def _wait_for(run: Run) -> None:
    """Until no process is at work on a run: what an earlier call started outlives it if that was killed."""
    told = False
    while run.folder.exists():
        with contextlib.suppress(UserError), manifest.held(run.folder):
            return
        if not told:
            say(f"{run.name} is at work in another process; waiting for it")
            told = True
        time.sleep(_POLL_S)


def _run(command: list[str], log: Path) -> int:
    """Runs a command, its words into a log; SIGTERM is passed on to it, and its end waited for."""
    with log.open("a", encoding="utf-8") as out:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=out, stderr=out)
    with _passing_on(process):
        return process.wait()


@contextlib.contextmanager
def _passing_on(process: subprocess.Popen[bytes]) -> Iterator[None]:
    before = signal.signal(signal.SIGTERM, lambda number, frame: process.send_signal(signal.SIGTERM))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _write_job(config: SweepConfig, words: list[str], missing: list[Run]) -> None:
    """The file of a job with a task for each missing run."""
    if not words or words[0].startswith("-"):
        raise UserError(f"target {config.target} needs a recipe, which the tasks read: jaxdistill sweep RECIPE.py ...")
    array = Array(
        words=("jaxdistill", "sweep", *_without_target(words)),
        runs=tuple(run.name for run in missing),
        at_once=config.at_once,
    )
    target = cast("launch.Target", config.target)  # one of its own
    job = LaunchConfig(target=target, recipe=Path(words[0]), workdir=config.workdir / "job", **vars(config.launch))
    launch.write(job, launch.render(job, array))


def _without_target(words: list[str]) -> list[str]:
    """A command line without the options that say where to run."""
    kept, leaves = [], False
    for word in words:
        if word.startswith("--"):
            leaves = word.partition("=")[0] in ("--target", "--at-once") or word.startswith("--launch.")
        if not leaves:
            kept.append(word)
    return kept
