"""Requests per second and CPU time per request: `jaxdistill collect` with its ledger against bare `openai` SDK calls.

    python benchmarks/collect.py [--requests 4000] [--in-flight 256] [--workers 1 2 4] [--rounds 3]

Both ask the same local teacher, a process of its own that shares the cores, in turn. The bare calls keep nothing and
judge nothing. Collection commits every request and answer to SQLite and verifies every answer; its rate is taken from
the first request sent to the last answer received, and its CPU time is that of all its processes, less that of a second
call with nothing left to ask (which verifies the answers again, so that verification is not in the figure).
"""

import argparse
import asyncio
import contextlib
import dataclasses
import json
import os
import resource
import sqlite3
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from jaxdistill.local_teacher.app import TeacherOptions
from jaxdistill.local_teacher.problems import generate
from jaxdistill.local_teacher.server import running_teacher
from jaxdistill.records import Problem, read_jsonl, write_jsonl


@dataclasses.dataclass(frozen=True)
class Measured:
    """One way of asking."""

    name: str
    requests_per_s: float
    cpu_ms: float  # per request


async def _bare(base_url: str, problems: list[Problem], in_flight: int) -> None:
    import openai

    slots = asyncio.Semaphore(in_flight)
    async with openai.AsyncOpenAI(api_key="none", base_url=base_url, max_retries=0) as client:

        async def one(problem: Problem) -> None:
            async with slots:
                await client.chat.completions.create(
                    model="local-teacher",
                    messages=[{"role": "user", "content": problem.problem}],
                    max_completion_tokens=400,
                )

        await asyncio.gather(*(one(problem) for problem in problems))


def bare(base_url: str, problems: Path, in_flight: int) -> None:
    """The child process of the bare calls: prints seconds and CPU seconds of the calls alone."""
    rows = list(read_jsonl(problems, Problem))
    started, cpu = time.perf_counter(), time.process_time()
    asyncio.run(_bare(base_url, rows, in_flight))
    print(json.dumps({"wall_s": time.perf_counter() - started, "cpu_s": time.process_time() - cpu}))


def measure_bare(base_url: str, problems: Path, count: int, in_flight: int) -> Measured:
    """Bare SDK calls in a process of their own."""
    command = [sys.executable, __file__, "--bare", base_url, "--problems", str(problems), "--in-flight", str(in_flight)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE)
    took = json.loads(done.stdout)
    return Measured("bare openai SDK", count / took["wall_s"], 1000 * took["cpu_s"] / count)


def measure_collect(base_url: str, problems: Path, count: int, in_flight: int, workers: int) -> Measured:
    """The command, from outside; a second call on the finished folder gives the CPU time that is no request's."""
    with tempfile.TemporaryDirectory(prefix="jaxdistill-benchmark-") as folder:
        words = [f"--problems={problems}", f"--workdir={folder}/run", "--prompt=", f"--workers={workers}"]
        words += [f"--teacher.base-url={base_url}", "--teacher.max-tokens=400", "--teacher.profile=local"]
        words += [f"--teacher.in-flight={max(1, in_flight // workers)}"]
        command = [sys.executable, "-m", "jaxdistill", "collect", *words]
        cpu_s = []
        for _ in range(2):
            before = resource.getrusage(resource.RUSAGE_CHILDREN)
            subprocess.run(command, check=True, stderr=subprocess.DEVNULL)
            after = resource.getrusage(resource.RUSAGE_CHILDREN)
            cpu_s.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
        with contextlib.closing(sqlite3.connect(Path(folder, "run", "ledger.sqlite"))) as database:
            sent, received = database.execute("SELECT min(sent), max(received) FROM responses").fetchone()
    name = f"collect, {workers} {'process' if workers == 1 else 'processes'}"
    return Measured(name, count / (received - sent), 1000 * (cpu_s[0] - cpu_s[1]) / count)


def main() -> None:
    """Prints a table, the best of the rounds for each way."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=4000)
    parser.add_argument("--in-flight", type=int, default=256)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--bare", help=argparse.SUPPRESS)
    parser.add_argument("--problems", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.bare:
        bare(arguments.bare, arguments.problems, arguments.in_flight)
        return
    best: dict[str, Measured] = {}
    with tempfile.TemporaryDirectory() as folder, running_teacher(TeacherOptions()) as base_url:
        problems = Path(folder, "problems.jsonl")
        count = write_jsonl(problems, generate("all", arguments.requests, seed=0, split="train"))
        for _ in range(arguments.rounds):
            found = [measure_bare(base_url, problems, count, arguments.in_flight)]
            found += [
                measure_collect(base_url, problems, count, arguments.in_flight, workers)
                for workers in arguments.workers
            ]
            for row in found:
                if row.name not in best or row.requests_per_s > best[row.name].requests_per_s:
                    best[row.name] = row
    reference = next(iter(best.values()))
    print(f"{count} requests, {arguments.in_flight} in flight, {os.cpu_count()} cores, the teacher's process included")
    for row in best.values():
        ratio = row.requests_per_s / reference.requests_per_s
        print(f"{row.name:24} {row.requests_per_s:7.0f} requests/s  {row.cpu_ms:6.2f} ms CPU/request  {ratio:5.2f}x")


if __name__ == "__main__":
    main()
