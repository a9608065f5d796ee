"""What a process does before its first array, joining its job and finding compiled programs, and when it is to end."""

import itertools
import os
import signal
import socket
import time
from collections.abc import Callable, Collection
from pathlib import Path
from types import FrameType
from typing import Any, TypeVar

import jax
import numpy as np
from jax._src import (
    cloud_tpu_init,  # no public name says what this one knows before the backend starts
    distributed,  # its key-value store has no public name
)
from jax.experimental import multihost_utils

from jaxdistill.errors import UserError
from jaxdistill.progress import say

T = TypeVar("T")

_HEARTBEAT_S = 40  # without a sign of life from one process, the others end
_SHUTDOWN_S = 20  # that a failing process waits for the others: they may be waiting for it
_WAIT_S = 24 * 3600  # for what the first process does alone: tokenizing much may take hours
_EXPLICIT = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
_COUNTS = ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE")  # of processes, as launchers say it


def start(join: bool = False, launched: float | None = None) -> None:
    """Prepares JAX; call once, before the first array.

    Compiled programs are kept in ~/.cache/jaxdistill/xla (or $JAX_COMPILATION_CACHE_DIR), so that a restart does
    not compile again.

    Args:
      join: the other processes of the job, if it has any; otherwise this one is on its own.
      launched: when this process was, seconds since the epoch; of a command that joins.
    """
    if join and launched is not None:
        _launch[:] = [launched]
    if not jax.config.values["jax_compilation_cache_dir"]:
        base = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
        jax.config.update("jax_compilation_cache_dir", str(base / "jaxdistill" / "xla"))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 1.0)
    if join:
        _join()


_launch: list[float] = []  # of the process, until a run takes it for its own


def launched() -> float:
    """When this run was launched, seconds since the epoch: now, for any but the first in its process."""
    return _launch.pop() if _launch else time.time()


def _join() -> None:
    """Finds the coordinator and the other processes: by three JAX_ variables, or as jax does under a launcher."""
    limits: dict[str, Any] = {"heartbeat_timeout_seconds": _HEARTBEAT_S, "shutdown_timeout_seconds": _SHUTDOWN_S}
    given = [os.environ.get(name) for name in _EXPLICIT]
    if all(given):  # jax itself reads the first of them alone
        address, count, number = given
        jax.distributed.initialize(address, int(count or 0), int(number or 0), **limits)
    elif cloud_tpu_init.running_in_cloud_tpu_vm or any(int(os.environ.get(name, 1)) > 1 for name in _COUNTS):
        jax.distributed.initialize(**limits)
    else:
        return
    # Without process 0 jax aborts the others before any Python of ours runs, and calls it the leader: say who that is
    where = distributed.global_state.coordinator_address
    say(f"process {jax.process_index()} of {jax.process_count()} on {socket.gethostname()}; the leader is at {where}")


def leads() -> bool:
    """Whether this process writes what a job writes once: its first one, or the only one."""
    return not jax.distributed.is_initialized() or jax.process_index() == 0


def meet(where: str) -> None:
    """Waits until every process of the job is here."""
    if jax.distributed.is_initialized():
        multihost_utils.sync_global_devices(where)


_turns = itertools.count()  # of `first_alone`; all processes come to them in the same order


def first_alone(do: Callable[[], T]) -> T:
    """What `do` gives; the first process of the job does it before the others, which find what it leaves on disk.

    A user's mistake that it finds is one in every process.
    """
    client = distributed.global_state.client if jax.distributed.is_initialized() else None
    if client is None:
        return do()
    turn, done = f"jaxdistill/first_alone/{next(_turns)}", "done"
    if not leads():
        if (outcome := client.blocking_key_value_get(turn, 1000 * _WAIT_S)) != done:
            raise UserError(outcome)
        return do()
    try:
        result = do()
    except UserError as error:
        client.key_value_set(turn, f"{error}")
        raise
    client.key_value_set(turn, done)
    return result


def anywhere(here: bool) -> bool:
    """Whether it is so in any process of the job; each of them asks."""
    if not jax.distributed.is_initialized():
        return here
    return bool(np.any(multihost_utils.process_allgather(np.array(here))))


def shared(numbers: Collection[int]) -> set[int]:
    """Those that every process of the job has; each of them asks. They are 0 or more; the 16 largest of each count."""
    if not jax.distributed.is_initialized():
        return set(numbers)
    mine = np.full(16, -1)
    largest = sorted(numbers)[-16:]
    mine[: len(largest)] = largest
    found: Any = multihost_utils.process_allgather(mine)
    return set.intersection(*(set(row.tolist()) for row in found)) - {-1}


class Preemption:
    """SIGTERM: this machine, or another one of the job, is about to be taken away."""

    def __init__(self):
        self._told = False
        self._asked = 0

    def __enter__(self) -> "Preemption":
        # Of several processes jax has a handler of its own, which tells the others as well
        self._before = None if jax.distributed.is_initialized() else signal.signal(signal.SIGTERM, self._tell)
        return self

    def __exit__(self, *exception: object) -> None:
        if self._before is not None:
            signal.signal(signal.SIGTERM, self._before)

    def _tell(self, number: int, frame: FrameType | None) -> None:
        self._told = True

    def reached(self) -> bool:
        """Whether to save and end now, the same answer in every process of the job; ask once a step."""
        self._asked += 1  # counted here: the number of a step starts again with each phase
        return self._told or multihost_utils.reached_preemption_sync_point(self._asked)
