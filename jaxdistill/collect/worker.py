"""Further processes that send requests of one run: they share its ledger and its budget, and end with its command."""

import asyncio
import contextlib
import dataclasses
import json
import os
import sys
import threading
from collections.abc import AsyncIterator, Callable
from pathlib import Path

from jaxdistill.collect.commits import Commits
from jaxdistill.collect.ledger import Ledger
from jaxdistill.collect.sender import Sender
from jaxdistill.collect.teacher import Teacher, TeacherConfig
from jaxdistill.errors import RunError

_END = b"end\n"


@contextlib.asynccontextmanager
async def workers(count: int, config: TeacherConfig, ledger: Path) -> AsyncIterator[Callable[[], None]]:
    """Runs `count` processes beside this one; at the end they finish what they have under way.

    Yields a check, to be called now and then: it raises RunError if a worker has died, since what it had under way
    would be waited for without end.
    """
    task = json.dumps({"teacher": dataclasses.asdict(config), "ledger": str(ledger.resolve())}).encode() + b"\n"
    processes: list[asyncio.subprocess.Process] = []
    try:
        for _ in range(count):
            process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", "jaxdistill.collect.worker"),
                stdin=asyncio.subprocess.PIPE,
                env={**os.environ, "PYTHONPATH": _python_path()},
                start_new_session=True,  # Ctrl-C reaches the command alone, which tells its workers
            )
            processes.append(process)
            assert process.stdin
            process.stdin.write(task)

        def check() -> None:
            if ended := [process.returncode for process in processes if process.returncode is not None]:
                raise RunError(
                    f"worker processes ended with exit codes {ended}; what they said stands above; "
                    "run the same command again to go on"
                )

        yield check
        for process in processes:
            assert process.stdin
            process.stdin.write(_END)
        for process in processes:
            await process.wait()
    finally:
        for process in processes:
            if process.returncode is None:
                process.kill()
                await process.wait()


def _python_path() -> str:
    root = str(Path(__file__).resolve().parent.parent.parent)
    return os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])


def main() -> None:
    """The worker: a task on the first line of standard input; `end`, or the end of the file, when it is over."""
    task = json.loads(sys.stdin.buffer.readline())
    teacher = Teacher(TeacherConfig(**task["teacher"]))
    over = threading.Event()
    threading.Thread(target=_listen, args=(over,), daemon=True).start()
    with Ledger(Path(task["ledger"]), joins=True) as ledger:
        asyncio.run(_send(teacher, ledger, over))


def _listen(over: threading.Event) -> None:
    if sys.stdin.buffer.readline() != _END:
        os._exit(1)  # the command was killed: whoever starts it again needs the ledger, and counts what was under way
    over.set()


async def _send(teacher: Teacher, ledger: Ledger, over: threading.Event) -> None:
    async with Commits(ledger) as commits:
        await Sender(teacher, commits, over.is_set).run()


if __name__ == "__main__":
    main()
