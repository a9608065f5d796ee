"""Decides what a text answers and whether that equals the gold answer, in a process that can be killed."""

import concurrent.futures
import contextlib
import dataclasses
import json
import logging
import os
import queue
import re
import resource
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Literal

from jaxdistill import thinking
from jaxdistill.records import Verdict

ANSWER_CHARACTERS = 4096  # a longer box holds reasoning, not an answer
DEPTH = 50  # brackets within brackets; the parser takes seconds for 400
WORKER_BYTES = 4 << 30  # address space of the worker: 9^{9^9} asks for more memory before it asks for more time
START_S = 60.0  # importing sympy takes 0.4 s, far longer on a busy disk

_BOX_OR_BRACE = re.compile(
    r"(?P<box>\\{1,2}(?:boxed|fbox)\s*\{)|\\.|[{}]", re.DOTALL
)  # linear: each token is read once


def extract_answer(text: str) -> str | None:
    r"""Content of the last balanced `\boxed{}` or `\fbox{}` after the thinking part, or None.

    The thinking part ends at the last `</think>`; a `<think>` that is never closed leaves no answer part.
    Escaped braces do not count, a box that never closes is ignored, and of nested boxes the outermost is taken,
    unless it holds nothing but a box.
    """
    return _last_box(thinking.split(text)[1])


def boxed_answers(text: str) -> list[str]:
    """What the answer part boxes, in order, boxes inside others left out."""
    boxes: list[tuple[int, int]] = []
    answer = thinking.split(text)[1]
    for start, end in _boxes(answer):
        while boxes and boxes[-1][0] > start:  # inside this one, which closed later
            boxes.pop()
        boxes.append((start, end))
    return [_content(answer[start:end]) for start, end in boxes]


_PHRASE = re.compile(
    r"(?:\b(?:final )?answer\s*(?:is|are|:|=)|(?:最终)?答案\s*(?:应?[是为]|[:：])|"
    r"结果\s*[是为]|故选|应选)\s*[:：]?",
    re.IGNORECASE,
)
_PHRASE_END = re.compile(
    r"[。；！]|[.!;](?=\s|$)|\s+(?:because|since|as|where)\b|[,，]\s*(?:because|since|so|因为|所以)"
)


def extract_phrase(text: str) -> str | None:
    """What follows the last "the answer is", "Final answer:", "答案是", "答案为" or "故选" after the thinking part."""
    answer_part = thinking.split(text)[1]
    last = None
    for last in _PHRASE.finditer(answer_part):  # noqa: B007
        pass
    if last is None:
        return None
    line = answer_part[last.end() :].strip().partition("\n")[0]
    answer = _PHRASE_END.split(line, maxsplit=1)[0]
    return answer.strip(" *`$：:").strip() or None


def _last_box(text: str) -> str | None:
    boxes = list(_boxes(text))  # an enclosing box closes later than the inner one
    return _content(text[slice(*boxes[-1])]) if boxes else None


def _boxes(text: str) -> Iterator[tuple[int, int]]:
    """Where the content of each box starts and ends, as they close."""
    open_braces: list[int | None] = []  # where the content of a box starts; None for a plain brace
    for token in _BOX_OR_BRACE.finditer(text):
        if token["box"]:
            open_braces.append(token.end())
        elif token[0] == "{":
            open_braces.append(None)
        elif token[0] == "}" and open_braces:
            start = open_braces.pop()
            if start is not None:
                yield start, token.start()


def _content(content: str) -> str:
    """What a box holds; a box that holds nothing but a box is that one."""
    content = content.strip()
    while len(content) <= ANSWER_CHARACTERS and (box := _BOX_OR_BRACE.match(content)) and box["box"]:
        inner = content[box.end() : -1]
        if not content.endswith("}") or not _balanced(inner):
            break
        content = inner.strip()
    return content


def _balanced(text: str) -> bool:
    depth = 0
    for token in _BOX_OR_BRACE.finditer(text):
        depth += (token["box"] is not None or token[0] == "{") - (token[0] == "}")
        if depth < 0:
            return False
    return depth == 0


_INTEGER = re.compile(r"([+-]?)0*(\d+|\d{1,3}(?:,\d{3})+)")
_BASE = re.compile(r"([0-9A-Za-z]+)_\{?(\d+)\}?")
_TEXT = re.compile(r"\\(?:text|textbf|textit|mathrm|mbox|rm)\s*\{([^{}]*)\}")
_SPELLINGS = re.compile(
    r"\\(?P<fraction>[dt]frac)(?![a-zA-Z])|\\(?:left|right|displaystyle)(?![a-zA-Z])|\\[!,;:]|\\?\$"
)


def normalize(answer: str) -> str:
    r"""Rewrites spellings that mean the same: `\dfrac`, `\left`, `\text{}`, dollars, spacing, a final full stop."""
    answer = _SPELLINGS.sub(lambda m: r"\frac" if m["fraction"] else "", answer)
    answer = _TEXT.sub(r" \1 ", answer)
    answer = re.sub(r"\s+", " ", answer).strip().removesuffix(".").removesuffix(" dollars")
    return re.sub(r"(?<!\w) | (?!\w)", "", answer)  # a space parts `2 x` from `2x` only between word characters


# 9^{9^9}, 10^{100000}, 123456!: nobody can compute them, and the worker would be killed trying.
_TOO_LARGE = re.compile(r"\^\s*\{?\s*\(?\s*\d+\s*\^|\^\s*\{?\s*\d{5,}|\d{5,}\s*!")


def _depth(text: str) -> int:
    """How deep brackets are nested in each other, whatever closes them."""
    depth = most = 0
    for character in text:
        depth += (character in "{([") - (character in "})]")
        most = max(most, depth)
    return most


def _fast(answer: str, gold: str) -> Verdict | None:
    """The verdict where none of math-verify is needed."""
    one, other = normalize(answer), normalize(gold)
    if one and one == other:
        return Verdict(label="correct", rule="exact", extracted=answer)
    integers = _INTEGER.fullmatch(one), _INTEGER.fullmatch(other)
    if integers[0] and integers[1]:
        values = [("-" if m[1] == "-" and m[2] != "0" else "") + m[2].replace(",", "") for m in integers if m]
        return Verdict(label="correct" if values[0] == values[1] else "wrong", rule="integer", extracted=answer)
    bases = _BASE.fullmatch(one), _BASE.fullmatch(other)
    if bases[0] and bases[1]:  # math-verify drops the base: 52_8 would equal 52_9
        same = bases[0].groups() == bases[1].groups()
        return Verdict(label="correct" if same else "wrong", rule="base", extracted=answer)
    if any(_TOO_LARGE.search(text) or _depth(text) > DEPTH for text in (one, other)):
        return Verdict(label="unverifiable", rule="too_large", extracted=answer)
    return None


class Verifier:
    """Judges answers; slow or hostile ones cost at most `timeout_s`, after which the worker process is killed.

    Safe to call from several threads, which then take turns. Rules that a verdict can name: exact, integer, base,
    math_verify (correct or wrong); no_answer (wrong); timeout, crash, unparsed, error, too_long, too_large
    (unverifiable). `phrase/` before a rule says that the answer was found behind a phrase, not in a box.
    """

    def __init__(self, timeout_s: float = 10.0):
        if not timeout_s > 0:
            raise ValueError(f"timeout_s is {timeout_s}, expected a positive number of seconds")
        self.timeout_s = timeout_s
        self._worker: subprocess.Popen[bytes] | None = None
        self._lock = threading.Lock()

    def __enter__(self) -> "Verifier":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends the worker process; a later call starts another."""
        with self._lock:
            self._kill()

    def verify(self, text: str, gold: str, phrases: bool = False) -> Verdict:
        """Judges the boxed answer of a whole output; without a box, and with `phrases`, what `extract_phrase` finds."""
        answer = extract_answer(text)
        if answer is None and phrases and (answer := extract_phrase(text)) is not None:
            verdict = self.equivalent(answer, gold)
            return dataclasses.replace(verdict, rule=f"phrase/{verdict.rule}")
        return Verdict(label="wrong", rule="no_answer") if answer is None else self.equivalent(answer, gold)

    def equivalent(self, answer: str, gold: str) -> Verdict:
        """Judges an answer that is already extracted. The order matters: `x = 5` may stand for a gold `5`."""
        if not answer.strip():
            return Verdict(label="wrong", rule="no_answer")
        if max(len(answer), len(gold)) > ANSWER_CHARACTERS:
            return Verdict(label="unverifiable", rule="too_long", extracted=answer[:ANSWER_CHARACTERS])
        return _fast(answer, gold) or self._ask(answer, gold)

    def _ask(self, answer: str, gold: str) -> Verdict:
        with self._lock:
            try:
                worker = self._worker or self._start()
                request = json.dumps({"answer": answer, "gold": gold, "limit_s": self.timeout_s})
                reply = _exchange(worker, request, self.timeout_s)
            except BaseException:  # an interrupted exchange leaves a reply in the pipe that the next call would read
                self._kill()
                raise
            if isinstance(reply, str):
                self._kill()
                return Verdict(label="unverifiable", rule=reply, extracted=answer)
        return Verdict(label=reply["label"], rule=reply["rule"], extracted=answer)

    def _start(self) -> subprocess.Popen[bytes]:
        package_root = str(Path(__file__).parent.parent)
        paths = [package_root, *filter(None, [os.environ.get("PYTHONPATH")])]
        self._worker = subprocess.Popen(
            [sys.executable, "-P", "-m", "jaxdistill.verify"],  # -P: a sympy.py in the user's folder is not sympy
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            bufsize=0,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
            start_new_session=True,  # Ctrl-C reaches the parent alone, so it is never recorded as a crash
        )
        reply = _exchange(self._worker, None, START_S)
        if isinstance(reply, str):
            code = self._kill()
            raise RuntimeError(
                f"the math-verify worker did not start ({reply}, exit code {code}); "
                f"to see why: {sys.executable} -m jaxdistill.verify"
            )
        return self._worker

    def _kill(self) -> int | None:
        worker, self._worker = self._worker, None
        if worker is None:
            return None
        worker.kill()
        for pipe in (worker.stdin, worker.stdout):
            if pipe:
                pipe.close()
        return worker.wait()


class VerifierPool:
    """Judges many outputs on several worker processes; each is killed and replaced on its own."""

    def __init__(self, workers: int, timeout_s: float = 10.0):
        if workers < 1:
            raise ValueError(f"workers is {workers}, expected at least 1")
        self._verifiers = [Verifier(timeout_s) for _ in range(workers)]
        self._idle = queue.SimpleQueue[Verifier]()
        for verifier in self._verifiers:
            self._idle.put(verifier)
        self._threads = concurrent.futures.ThreadPoolExecutor(workers)

    def __enter__(self) -> "VerifierPool":
        return self

    def __exit__(self, *_: object) -> None:
        self._threads.shutdown(cancel_futures=True)
        for verifier in self._verifiers:
            verifier.close()

    def verify_all(self, outputs: Iterable[tuple[str, str]], phrases: bool = False) -> Iterator[Verdict]:
        """The verdicts on (text, gold) pairs, in their order; the pairs are read at once."""

        def one(output: tuple[str, str]) -> Verdict:
            verifier = self._idle.get()
            try:
                return verifier.verify(*output, phrases=phrases)
            finally:
                self._idle.put(verifier)

        return self._threads.map(one, outputs)


def _exchange(
    worker: subprocess.Popen[bytes], request: str | None, limit_s: float
) -> dict[str, Any] | Literal["timeout", "crash"]:
    """Sends one line (or none) and waits for one; sending cannot block for long, since an idle worker reads at once."""
    assert worker.stdin
    assert worker.stdout
    deadline = time.monotonic() + limit_s
    if request is not None:
        try:
            worker.stdin.write(request.encode() + b"\n")
        except BrokenPipeError:
            return "crash"
    poll = select.poll()
    poll.register(worker.stdout, select.POLLIN)
    received = b""
    while not received.endswith(b"\n"):
        remaining_s = deadline - time.monotonic()
        if remaining_s <= 0 or not poll.poll(remaining_s * 1000):
            return "timeout"
        piece = os.read(worker.stdout.fileno(), 1 << 16)
        if not piece:
            return "crash"
        received += piece
    return json.loads(received)


def _serve() -> None:
    """The worker: a request a line on standard input, a reply a line on standard output, until end of file."""
    replies = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # nothing that a parser prints can look like a reply
    with contextlib.suppress(ValueError, OSError):  # macOS refuses limits on address space
        resource.setrlimit(resource.RLIMIT_AS, (WORKER_BYTES, WORKER_BYTES))
    logging.disable(logging.CRITICAL)
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    _compare(r"\frac{1}{2}", "0.5")  # builds the parser's tables
    print(json.dumps({"label": "correct", "rule": "ready"}), file=replies)
    for line in sys.stdin:
        request = json.loads(line)
        # Ends an orphan even inside one endless C call: the default action of SIGALRM needs no Python code to run.
        signal.setitimer(signal.ITIMER_REAL, request["limit_s"] + 5)
        label, rule = _compare(request["answer"], request["gold"])
        signal.setitimer(signal.ITIMER_REAL, 0)
        print(json.dumps({"label": label, "rule": rule}), file=replies)


def _compare(answer: str, gold: str) -> tuple[str, str]:
    import math_verify

    # Only the box: otherwise a number inside a sentence would pass for the answer.
    target = math_verify.LatexExtractionConfig(try_extract_without_anchor=False, boxed_match_priority=0)

    def parse(text: str) -> list[Any]:
        text = re.sub(r"\\(?:boxed|fbox)(?![a-zA-Z])", "", text).strip().removesuffix(".").removesuffix(" dollars")
        return math_verify.parse(f"\\boxed{{{text}}}", [target], parsing_timeout=None)  # pyright: ignore[reportArgumentType]

    try:
        golds, answers = parse(gold), parse(answer)
        if math_verify.verify(golds, answers, timeout_seconds=None, raise_on_error=True):
            return "correct", "math_verify"
    except Exception:
        return "unverifiable", "error"
    parsed = all(any(not isinstance(value, str) for value in values) for values in (golds, answers))
    return ("wrong", "math_verify") if parsed else ("unverifiable", "unparsed")


if __name__ == "__main__":
    _serve()
