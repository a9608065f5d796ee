"""A headless Chromium, where one is installed, that opens a page and runs expressions in it."""

import contextlib
import fcntl
import itertools
import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

_NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


class Page:
    """A page that was opened, spoken to over DevTools' pipe."""

    def __init__(self, commands: int, answers: int):
        self._commands, self._answers = commands, os.fdopen(answers, "rb", buffering=0)
        self._ids, self._left, self._session = itertools.count(1), b"", None

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """A method of the DevTools protocol; its result."""
        number = next(self._ids)
        message = {"id": number, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._commands, json.dumps(message).encode() + b"\0")
        while True:
            while b"\0" not in self._left:
                piece = self._answers.read(1 << 20)
                assert piece, "the browser ended"
                self._left += piece
            line, _, self._left = self._left.partition(b"\0")
            answer = json.loads(line)
            if answer.get("id") == number:
                assert "error" not in answer, answer
                return answer["result"]

    def attach(self) -> None:
        """Takes the first tab."""
        [target] = [t for t in self.call("Target.getTargets")["targetInfos"] if t["type"] == "page"][:1]
        self._session = self.call("Target.attachToTarget", targetId=target["targetId"], flatten=True)["sessionId"]

    def evaluate(self, expression: str) -> Any:
        """The value of an expression of JavaScript, awaited if it is a promise."""
        found = self.call("Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def open(self, path: Path) -> float:
        """Opens a file; milliseconds until all of it is loaded and its scripts have run."""
        self.call("Page.enable")
        self.call("Page.navigate", url=path.resolve().as_uri())
        loaded = "new Promise(done => document.readyState === 'complete' ? done() : addEventListener('load', done))"
        self.evaluate(loaded)
        return self.evaluate("performance.getEntriesByType('navigation')[0].loadEventStart")


@contextlib.contextmanager
def browser() -> Iterator[Page]:
    """A browser with an empty page; the test is skipped where none is installed."""
    program = next(filter(None, map(shutil.which, _NAMES)), None)
    if program is None:
        pytest.skip(f"no browser: none of {', '.join(_NAMES)} is installed")
    read_commands, commands = os.pipe()
    answers, write_answers = os.pipe()
    theirs = [fcntl.fcntl(end, fcntl.F_DUPFD, 10) for end in (read_commands, write_answers)]  # clear of 3 and 4
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        flags = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={profile}", "about:blank"]
        places = 'exec 3<&"$0" 4>&"$1"; exec "${@:2}"'  # where --remote-debugging-pipe expects them
        process = subprocess.Popen(
            ["bash", "-c", places, *map(str, theirs), program, "--remote-debugging-pipe", *flags],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            pass_fds=theirs,
        )
        for end in (read_commands, write_answers, *theirs):
            os.close(end)
        page = Page(commands, answers)
        try:
            page.attach()
            yield page
        finally:
            process.terminate()
            process.wait(timeout=20)
            os.close(commands)
            page._answers.close()
