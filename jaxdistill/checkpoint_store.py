"""The Orbax checkpoints of one phase: how they are written, which are kept, and whether they can be read back."""

import contextlib
import dataclasses
import errno
import gc
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import preservation_policy as policies

from jaxdistill import integrity, runtime
from jaxdistill.errors import RunError, StuckError, UserError, disk_full

FOLDER, _DAMAGED = "checkpoints", "damaged"
RESULT = "params"  # the state's field that holds the weights, where a checkpoint names no other
LIMIT_S = 1200.0  # Orbax's own time for a save
_CHUNK_BYTES = 2**28  # of an array, which are read and written as one
# Orbax measures its time for a save by the clock on the wall, which may jump by days; milliseconds of this fit 31 bits
_ORBAX_LIMIT_S = 2_000_000


@dataclasses.dataclass(frozen=True, kw_only=True)
class Retention:
    """Which checkpoints of a phase stay on disk; one that any of these names does."""

    keep: int = 2  # the newest
    keep_every: int | None = None  # every so many steps
    keep_best: int = 0  # those of the lowest held-out loss, which is then measured at every checkpoint

    def __post_init__(self):
        if self.keep < 1 or self.keep_best < 0 or (self.keep_every is not None and self.keep_every < 1):
            raise UserError(f"{self}: expected keep and keep_every of 1 or more, keep_best of 0 or more")

    def policy(self) -> Any:
        """As Orbax takes it."""
        kept: list[Any] = [policies.LatestN(self.keep)]
        if self.keep_every:
            kept.append(policies.EveryNSteps(self.keep_every))
        if self.keep_best:
            kept.append(
                policies.BestN(
                    get_metric_fn=_heldout_loss, reverse=True, n=self.keep_best, keep_checkpoints_without_metrics=False
                )
            )
        return policies.AnyPreservationPolicy(kept)


RETENTION = Retention()


class DamagedError(RunError):
    """A checkpoint cannot be read back as it was saved; the message names it and what is wrong."""


class Checkpoints:
    """The checkpoints of one phase: `checkpoints/<step>` under its folder, written in the background.

    Args:
      limit_s: seconds that writing one may take.
      read_only: whether the folder stays as it is, leftovers and damage included.
    """

    def __init__(
        self, folder: Path, retention: Retention = RETENTION, limit_s: float = LIMIT_S, read_only: bool = False
    ):
        self._folder, self._limit_s, self._read_only = folder, limit_s, read_only
        self._keeps_best = retention.keep_best > 0
        self._started: float | None = None  # when the save under way was, by the clock that never jumps
        self.blocked_s = 0.0  # seconds that saving has held up the caller
        self._manager = ocp.CheckpointManager(
            (folder / FOLDER).absolute(),
            options=ocp.CheckpointManagerOptions(
                preservation_policy=retention.policy(),
                best_fn=_heldout_loss if retention.keep_best else None,
                best_mode="min",
                create=not read_only,
                cleanup_tmp_directories=not read_only,  # of a save that was killed: nobody else would free its bytes
                async_options=ocp.AsyncOptions(timeout_secs=_ORBAX_LIMIT_S),
            ),
        )

    @property
    def latest_step(self) -> int | None:
        """The newest step that was written whole, or None."""
        return self._manager.latest_step()

    @property
    def best_step(self) -> int | None:
        """The step of the lowest held-out loss; None where none was measured, or checkpoints are not kept by it."""
        steps = {step: self._manager.metrics(step) for step in self._manager.all_steps()} if self._keeps_best else {}
        return min((step for step in steps if steps[step]), key=lambda step: _heldout_loss(steps[step]), default=None)

    def save(self, step: int, state: Any, input_position: dict[str, Any], heldout_loss: float | None = None) -> None:
        """Starts to write; the devices' memory has been copied when this returns.

        Args:
          heldout_loss: at this step, where it was measured.

        Raises:
          OSError: ENOSPC, before anything is written where it can be foreseen; earlier checkpoints stay usable.
          StuckError: the save before is not written in its time.
        """
        with _failures_named(self._folder), self._blocking():
            self._wait()  # its bytes count, and those of what it replaces are free again
            needed = sum(leaf.nbytes for leaf in jax.tree.leaves(state))  # of all processes, so that all agree
            if shutil.disk_usage(self._folder).free < needed:
                raise disk_full(self._folder)
            measured = None if heldout_loss is None else {"heldout_loss": heldout_loss}
            self._write(step, state, {**input_position, "sums": integrity.sums(state)}, measured)

    def _write(self, step: int, state: Any, input_position: dict[str, Any], measured: dict[str, float] | None) -> None:
        saved = ocp.args.StandardSave(state, save_args(state))
        items = ocp.args.Composite(state=saved, input=ocp.args.JsonSave(input_position))
        self._manager.save(step, args=items, metrics=measured)
        self._started = time.monotonic()

    def _wait(self) -> None:
        """Until the save under way is written.

        That may be never: tensorstore starts no thread before the clock on the wall has passed the time at which it
        started its last one, so that one that is set back by days lets a save wait for days.
        """
        while self._started is not None and self._manager.is_saving_in_progress():
            if time.monotonic() - self._started > self._limit_s:
                raise StuckError(
                    f"{self._folder}: a checkpoint was not written in {self._limit_s:g} s; the storage hangs, or the "
                    "clock was set back. Those before it are whole: run the same command again, with a larger "
                    "save_limit_s if the storage is just slow"
                )
            time.sleep(0.01)
        self._started = None
        self._manager.wait_until_finished()

    @contextlib.contextmanager
    def _blocking(self) -> Iterator[None]:
        started = time.perf_counter()
        try:
            yield
        finally:
            self.blocked_s += time.perf_counter() - started

    def restore(self, step: int, like: Any) -> tuple[Any, dict[str, Any]]:
        """The state and the input position of a step, laid out like `like` (arrays or ShapeDtypeStructs).

        Raises:
          DamagedError: in every process of the job, if one of them cannot read it or an array is not what was saved.
        """
        items = ocp.args.Composite(state=ocp.args.StandardRestore(like), input=ocp.args.JsonRestore())
        found, wrong = None, f"{self._place(step)} cannot be read: another host says so"
        try:
            with _reading_alone(self._folder) as manager:
                found = attempt(self._place(step), lambda: manager.restore(step, args=items))
        except DamagedError as error:
            wrong = str(error)
        if runtime.anywhere(found is None) or found is None:
            raise DamagedError(wrong)
        state, position = found["state"], found["input"]
        refuse(self._place(step), integrity.changed(state, position.pop("sums", {})))
        return state, position

    def restore_newest(
        self, like: Any, tell: Callable[[str], None], before: int | None = None
    ) -> tuple[int, Any, dict[str, Any]] | None:
        """The newest step that can be read back, and what `restore` gives; None where there is no checkpoint.

        Damaged ones are told of and moved to the folder `damaged` beside `checkpoints`. Where the folder is to stay as
        it is they are only told of, and are as if there were none.

        Args:
          before: only steps below this one, if it is given.

        Raises:
          UserError: there were some and all are damaged.
        """
        steps = [step for step in sorted(self._manager.all_steps(), reverse=True) if before is None or step < before]
        for step in steps:
            try:
                return step, *self.restore(step, like)
            except DamagedError as error:
                now = "left there" if self._read_only else f"moved to {self._set_aside(step)}"
                tell(f"checkpoint damaged: {error}; {now}, and the one before it is looked at")
        if steps and not self._read_only:
            raise UserError(
                f"{self._folder}: none of its checkpoints {sorted(steps)} can be read, and all are in {_DAMAGED} now; "
                "put a good copy of one back, or run again to start this phase from its first step"
            )
        return None

    def _place(self, step: int) -> Path:
        return self._folder / FOLDER / str(step)

    def _set_aside(self, step: int) -> Path:
        aside = self._folder / _DAMAGED / str(step)
        if runtime.leads():
            aside.parent.mkdir(exist_ok=True)
            shutil.rmtree(aside, ignore_errors=True)  # an earlier one of the same step
            self._place(step).rename(aside)
        runtime.meet(f"step {step} is set aside")
        self._manager.reload()
        return aside

    def close(self) -> None:
        """Waits until everything is written. Raises as `save`."""
        with _failures_named(self._folder), self._blocking():
            self._wait()
            self._manager.close()


def _heldout_loss(metrics: Any) -> float:
    return metrics["heldout_loss"]


def save_args(state: Any) -> Any:
    """How Orbax is to cut a state's arrays: weights that are stacked layer by layer, so that one layer can be read."""

    def one(x: Any) -> ocp.SaveArgs:
        if x.ndim < 2:
            return ocp.SaveArgs()
        return ocp.SaveArgs(chunk_byte_size=_CHUNK_BYTES, shard_axes=(0,) if x.ndim > 2 else ())

    return jax.tree.map(one, state)


def attempt(place: Path, read: Callable[[], Any]) -> Any:
    """What `read` gives of a checkpoint.

    Raises:
      DamagedError: for whatever Orbax and tensorstore raise for files that are cut, lost or mixed, a plain Exception
        among them; what is of this package or of a device's memory comes through.
    """
    try:
        return read()
    except (RunError, UserError, jax.errors.JaxRuntimeError):
        raise
    except Exception as error:
        wrong = _innermost(error)
    _forget_other_reads()
    raise DamagedError(f"{place} cannot be read ({wrong})")


def refuse(place: Path, changed: list[str]) -> None:
    """Says that arrays of a checkpoint are not those that were saved, if there are any such.

    Raises:
      DamagedError: there are.
    """
    if changed:
        raise DamagedError(f"{place} is not what was saved: {', '.join(changed)}")


def _innermost(error: BaseException) -> str:
    """The first cause of an exception in a line, without traces and status codes."""
    while inner := error.__cause__ or (None if error.__suppress_context__ else error.__context__):
        error = inner
    return f"{type(error).__name__}: {error}".splitlines()[0][:200]


def _forget_other_reads() -> None:
    """Waits for the reads beside the one that failed.

    Orbax ends its event loop under them. Each tells Python, which would print what nobody asked about, at any time.
    """
    hook, seen = sys.unraisablehook, [0]

    def count(_: Any) -> None:
        seen[0] += 1

    sys.unraisablehook = count
    try:
        for _ in range(8):
            before = seen[0]
            gc.collect()
            time.sleep(0.25)
            if seen[0] == before:
                break
    finally:
        sys.unraisablehook = hook


def _reading_alone(phase: Path) -> ocp.CheckpointManager:
    """A reader that waits for no other process: one that finds damage must be able to say so to the others."""
    me = jax.process_index()
    alone = ocp.options.MultiprocessingOptions(
        primary_host=me, active_processes={me}, barrier_sync_key_prefix=f"reader{me}"
    )
    return ocp.CheckpointManager(
        (phase / FOLDER).absolute(),
        options=ocp.CheckpointManagerOptions(create=False, multiprocessing_options=alone),
    )


@contextlib.contextmanager
def _failures_named(folder: Path) -> Iterator[None]:
    """Tensorstore's word for a full disk, as the operating system says it."""
    try:
        yield
    except ValueError as error:
        if "RESOURCE_EXHAUSTED" not in str(error) and os.strerror(errno.ENOSPC) not in str(error):
            raise
        raise disk_full(folder) from None


def newest_input(phase: Path) -> tuple[int, dict[str, Any]] | None:
    """The newest step of a phase's folder that can be read, and what it holds about the input; None without one."""
    if not (phase / FOLDER).is_dir():
        return None
    with ocp.CheckpointManager((phase / FOLDER).absolute()) as manager:
        for step in sorted(manager.all_steps(), reverse=True):
            with contextlib.suppress(DamagedError):  # `restore_newest` names it
                found = read_input(manager, phase, step)
                found.pop("sums", None)
                return step, found
    return None


def read_input(manager: ocp.CheckpointManager, phase: Path, step: int) -> dict[str, Any]:
    """What a checkpoint holds beside the state: the place in the input, what it stands on, the sums of its arrays.

    Raises:
      DamagedError: it cannot be read.
    """
    items = ocp.args.Composite(input=ocp.args.JsonRestore())
    return attempt(phase / FOLDER / str(step), lambda: manager.restore(step, args=items)["input"])
