"""The Orbax checkpoints of one phase: how they are written, which are kept, and whether they can be read back."""

import contextlib
import errno
import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint import type_handlers

from jaxdistill import integrity, runtime
from jaxdistill.checkpoint_damage import DamagedError, attempt, refuse
from jaxdistill.checkpoint_retention import LIMIT_S, RETENTION, Retention, heldout_loss
from jaxdistill.errors import StuckError, UserError, disk_full

FOLDER, _DAMAGED = "checkpoints", "damaged"
RESULT = "params"  # the state's field that holds the weights, where a checkpoint names no other
_CHUNK_BYTES = 2**28  # of an array, which are read and written as one
# Orbax measures its time for a save by the clock on the wall, which may jump by days; milliseconds of this fit 31 bits
_ORBAX_LIMIT_S = 2_000_000


class Checkpoints:
    """The checkpoints of one phase: `checkpoints/<step>` under its folder, written in the background.

    Args:
      limit_s: seconds that writing one may take.
      read_only: whether the folder stays as it is, leftovers and damage included.
      own: whether each process has such a folder for itself, with its own shards in it.
    """

    def __init__(
        self,
        folder: Path,
        retention: Retention = RETENTION,
        limit_s: float = LIMIT_S,
        *,
        read_only: bool = False,
        own: bool = False,
    ):
        self._folder, self._limit_s, self._read_only, self._own = folder, limit_s, read_only, own
        self._keeps_best = retention.keep_best > 0
        self._started: float | None = None  # when the save under way was, by the clock that never jumps
        self.blocked_s = 0.0  # seconds that saving has held up the caller
        if own:
            (folder / FOLDER).mkdir(parents=True, exist_ok=True)
        self._manager = ocp.CheckpointManager(
            (folder / FOLDER).absolute(),
            options=ocp.CheckpointManagerOptions(
                preservation_policy=retention.policy(),
                best_fn=heldout_loss if retention.keep_best else None,
                best_mode="min",
                create=not read_only and not own,
                cleanup_tmp_directories=not read_only,  # of a save that was killed: nobody else would free its bytes
                async_options=ocp.AsyncOptions(
                    timeout_secs=_ORBAX_LIMIT_S,
                    # Its word that a folder is there goes to all processes, and means the first one's
                    create_directories_asynchronously=not own,
                ),
                multiprocessing_options=_alone("own") if own else ocp.options.MultiprocessingOptions(),
            ),
            item_handlers=_own_handlers() if own else None,
        )

    @property
    def latest_step(self) -> int | None:
        """The newest step that was written whole, or None."""
        return self._manager.latest_step()

    @property
    def best_step(self) -> int | None:
        """The step of the lowest held-out loss; None where none was measured, or checkpoints are not kept by it."""
        steps = {step: self._manager.metrics(step) for step in self._manager.all_steps()} if self._keeps_best else {}
        return min((step for step in steps if steps[step]), key=lambda step: heldout_loss(steps[step]), default=None)

    def save(self, step: int, state: Any, input_position: dict[str, Any], heldout_loss: float | None = None) -> None:
        """Starts to write; the devices' memory has been copied when this returns.

        Args:
          heldout_loss: at this step, where it was measured.

        Raises:
          OSError: ENOSPC, before anything is written where it can be foreseen; earlier checkpoints stay usable.
          StuckError: the save before is not written in its time.
        """
        with _failures_named(self._folder), self._blocking():
            self.wait()  # its bytes count, and those of what it replaces are free again
            needed = sum(_bytes_here(leaf) if self._own else leaf.nbytes for leaf in jax.tree.leaves(state))
            if runtime.anywhere(shutil.disk_usage(self._folder).free < needed):
                raise disk_full(self._folder)
            measured = None if heldout_loss is None else {"heldout_loss": heldout_loss}
            self._write(step, state, {**input_position, "sums": integrity.sums(state)}, measured)

    def _write(self, step: int, state: Any, input_position: dict[str, Any], measured: dict[str, float] | None) -> None:
        saved = ocp.args.PyTreeSave(state, save_args=save_args(state))
        items = ocp.args.Composite(state=saved, input=ocp.args.JsonSave(input_position))
        self._manager.save(step, args=items, metrics=measured)
        self._started = time.monotonic()

    @property
    def busy(self) -> bool:
        """Whether one is being written."""
        return self._started is not None and self._manager.is_saving_in_progress()

    def wait(self) -> None:
        """Until the save under way is written.

        That may be never: tensorstore starts no thread before the clock on the wall has passed the time at which it
        started its last one, so that one that is set back by days lets a save wait for days.

        Raises:
          StuckError: it was not in its time.
        """
        while self.busy:
            if time.monotonic() - (self._started or 0) > self._limit_s:
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

    def steps(self) -> set[int]:
        """Those that are there, in every process."""
        steps = set(self._manager.all_steps())
        return runtime.shared(steps) if self._own else steps

    def _place(self, step: int) -> Path:
        return self._folder / FOLDER / str(step)

    def drop_after(self, step: int) -> None:
        """Removes what this process alone still has of later steps, in a folder of its own: they are done again."""
        for later in [later for later in self._manager.all_steps() if self._own and later > step]:
            self._manager.delete(later)  # Orbax would save no step before it

    def set_aside(self, step: int) -> Path | None:
        """Moves a damaged one to the folder `damaged` beside `checkpoints`, and says where it is now; None is there."""
        if self._read_only:
            return None
        aside = self._folder / _DAMAGED / str(step)
        if self._own or runtime.leads():
            aside.parent.mkdir(exist_ok=True)
            shutil.rmtree(aside, ignore_errors=True)  # an earlier one of the same step
            self._place(step).rename(aside)
        runtime.meet(f"step {step} is set aside")
        self._manager.reload()
        return aside

    def close(self) -> None:
        """Waits until everything is written. Raises as `save`."""
        with _failures_named(self._folder), self._blocking():
            self.wait()
            self._manager.close()


def restore_newest(
    places: Sequence[Checkpoints], like: Any, tell: Callable[[str], None], before: int | None = None
) -> tuple[int, Any, dict[str, Any]] | None:
    """The newest step that can be read back in any of these places, and what `restore` gives; None where there is none.

    Damaged ones are told of and moved to the folder `damaged` beside `checkpoints`. Where a folder is to stay as it is
    they are only told of, and are as if there were none.

    Args:
      before: only steps below this one, if it is given.

    Raises:
      UserError: there were some and all are damaged.
    """
    found = [(step, place) for place in places for step in place.steps() if before is None or step < before]
    moved: list[str] = []
    for step, place in sorted(found, key=lambda pair: pair[0], reverse=True):
        try:
            state, position = place.restore(step, like)
        except DamagedError as error:
            aside = place.set_aside(step)
            now = "left there" if aside is None else f"moved to {aside}"
            tell(f"checkpoint damaged: {error}; {now}, and the one before it is looked at")
            moved += [] if aside is None else [str(aside)]
        else:
            for each in places:
                each.drop_after(step)
            return step, state, position
    if moved:
        raise UserError(
            f"no checkpoint can be read, and all are set aside now: {', '.join(moved)}; put a good copy of one back, "
            "or run again to start this phase from its first step"
        )
    for each in places:
        each.drop_after(0)
    return None


def save_args(state: Any) -> Any:
    """How Orbax is to cut a state's arrays: weights that are stacked layer by layer, so that one layer can be read."""

    def one(x: Any) -> ocp.SaveArgs:
        if x.ndim < 2:
            return ocp.SaveArgs()
        return ocp.SaveArgs(chunk_byte_size=_CHUNK_BYTES, shard_axes=(0,) if x.ndim > 2 else ())

    return jax.tree.map(one, state)


def _alone(prefix: str) -> ocp.options.MultiprocessingOptions:
    """A manager that waits for no other process.

    Args:
      prefix: of what it says to itself, another one for each kind of manager.
    """
    me = jax.process_index()
    return ocp.options.MultiprocessingOptions(
        primary_host=me, active_processes={me}, barrier_sync_key_prefix=f"{prefix}{me}"
    )


def _reading_alone(phase: Path) -> ocp.CheckpointManager:
    """A reader that waits for no other process: one that finds damage must be able to say so to the others."""
    return ocp.CheckpointManager(
        (phase / FOLDER).absolute(),
        options=ocp.CheckpointManagerOptions(create=False, multiprocessing_options=_alone("reader")),
    )


def _own_handlers() -> dict[str, Any]:
    """Orbax's writers, where a process writes all that its devices hold and not only what no process before it does.

    As in Orbax's emergency checkpoints, which need several slices of a TPU.
    """
    arrays = type_handlers.ArrayHandler(primary_host=jax.process_index(), replica_id=None, use_replica_parallel=False)
    return {
        "state": ocp.PyTreeCheckpointHandler(
            multiprocessing_options=_alone("own"),
            type_handler_registry=type_handlers.create_type_handler_registry((jax.Array, arrays)),
        ),
        "input": ocp.JsonCheckpointHandler(multiprocessing_options=_alone("own")),
    }


def _bytes_here(x: jax.Array) -> int:
    """Of an array, what the devices of this process hold, each part once."""
    return sum({repr(shard.index): shard.data.nbytes for shard in x.addressable_shards}.values())


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
