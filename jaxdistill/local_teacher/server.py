"""The local teacher as a real server process on loopback."""

import argparse
import contextlib
import dataclasses
import os
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from jaxdistill.local_teacher.answers import Faults
from jaxdistill.local_teacher.app import Teacher, TeacherOptions

START_S = 60.0  # limit for the server process to say that it listens; slow only on a busy disk
_OTHER = ("faults", "log", "script")  # options whose arguments are written otherwise


@contextlib.contextmanager
def running_teacher(options: TeacherOptions | None = None) -> Iterator[str]:
    """Runs the teacher in a process of its own and yields its base URL, such as http://127.0.0.1:41234/v1.

    The process ends with the block, and also when this process is killed: it watches a pipe that only this one holds.

    Raises:
      RuntimeError: it did not start; the message ends with what it wrote on standard error.
    """
    options = options or TeacherOptions()
    with tempfile.TemporaryDirectory(prefix="jaxdistill-teacher-") as folder:
        ready, errors = Path(folder, "ready"), Path(folder, "errors")
        command = [sys.executable, "-m", "jaxdistill.local_teacher.server", "--ready-file", str(ready)]
        with errors.open("wb") as error_file:
            process = subprocess.Popen(
                [*command, "--end-with-stdin", *_arguments(options)],
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=error_file,
                env={**os.environ, "PYTHONPATH": _python_path()},
                start_new_session=True,  # Ctrl-C ends the collector first, which then ends the teacher
            )
        try:
            deadline = time.monotonic() + START_S
            while not ready.exists():
                if process.poll() is not None or time.monotonic() > deadline:
                    raise RuntimeError(f"the local teacher did not start: {errors.read_text()[-2000:]}")
                time.sleep(0.02)
            yield ready.read_text().strip()
        finally:
            process.kill()
            assert process.stdin
            process.stdin.close()
            process.wait()


def _python_path() -> str:
    root = str(Path(__file__).resolve().parent.parent.parent)
    return os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])


def _arguments(options: TeacherOptions) -> list[str]:
    """The command-line form of the options; `_options` reads it back."""
    values = {f.name: getattr(options, f.name) for f in dataclasses.fields(options) if f.name not in _OTHER}
    values |= {f"{name}_rate": rate for name, rate in dataclasses.asdict(options.faults).items()}
    values |= {name: path.resolve() for name in ("log", "script") if (path := getattr(options, name))}
    return [f"--{name.replace('_', '-')}={value}" for name, value in values.items()]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m jaxdistill.local_teacher.server", description=__doc__)
    parser.add_argument("--port", type=int, default=0, help="port on 127.0.0.1; 0 takes a free one")
    parser.add_argument("--ready-file", type=Path, help="file that receives the base URL once the server listens")
    parser.add_argument("--end-with-stdin", action="store_true", help="end when standard input is closed")
    parser.add_argument("--log", type=Path, help="JSON Lines file, one object a request")
    parser.add_argument("--script", type=Path, help="JSON Lines file: what happens to the requests, in turn")
    for field in dataclasses.fields(TeacherOptions):
        if field.name not in _OTHER:
            assert not isinstance(field.default, dataclasses._MISSING_TYPE)
            kind = _boolean if isinstance(field.default, bool) else type(field.default)
            parser.add_argument(f"--{field.name.replace('_', '-')}", type=kind, default=field.default)
    for field in dataclasses.fields(Faults):
        parser.add_argument(f"--{field.name.replace('_', '-')}-rate", type=float, default=field.default)
    return parser


def _boolean(text: str) -> bool:
    return text == "True"


def _options(arguments: argparse.Namespace) -> TeacherOptions:
    values = vars(arguments)
    return TeacherOptions(
        faults=Faults(**{f.name: values[f"{f.name}_rate"] for f in dataclasses.fields(Faults)}),
        **{f.name: values[f.name] for f in dataclasses.fields(TeacherOptions) if f.name != "faults"},
    )


def _end_with_stdin() -> None:
    sys.stdin.buffer.read()
    os._exit(0)  # the log is written line by line: nothing is lost


def main() -> None:
    """Serves until it is stopped."""
    import uvicorn

    parser = _parser()
    arguments = parser.parse_args()
    try:
        options = _options(arguments)
    except ValueError as error:
        parser.error(str(error))
    listener = socket.create_server(("127.0.0.1", arguments.port), backlog=1024)
    base_url = f"http://127.0.0.1:{listener.getsockname()[1]}/v1"
    if arguments.end_with_stdin:
        threading.Thread(target=_end_with_stdin, daemon=True).start()
    teacher = Teacher(options)
    print(base_url, flush=True)
    if arguments.ready_file:
        partial = arguments.ready_file.with_name(arguments.ready_file.name + ".partial")
        partial.write_text(base_url + "\n")
        partial.replace(arguments.ready_file)
    config = uvicorn.Config(teacher.app(), log_level="warning", access_log=False, lifespan="off")
    uvicorn.Server(config).run(sockets=[listener])


if __name__ == "__main__":
    main()
