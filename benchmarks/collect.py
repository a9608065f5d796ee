"""Requests per second and CPU time per request: `jaxdistill collect` with its ledger against bare `openai` SDK calls.

    python benchmarks/collect.py [--requests 4000] [--in-flight 256] [--workers 1 2 4] [--rounds 3] [--write]

Both ask the same local teacher, a process of its own that shares the cores, in turn. The bare calls keep nothing and
judge nothing. Collection commits every request and answer to SQLite and verifies every answer; its rate is taken from
the first request sent to the last answer received, and its CPU time is that of all its processes, less that of a second
call with nothing left to ask (which verifies the answers again, so that verification is not in the figure). All
processes of a command share one ledger and one budget: after each run the ledger must hold every answer once, and its
account the sum of what they cost. `--write` writes benchmarks/results/collect.md; run it on an idle machine.
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
from jaxdistill.manifest import commit
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
        words += [f"--teacher.in-flight={max(1, in_flight // workers)}", "--budget-usd=1000"]
        command = [sys.executable, "-m", "jaxdistill", "collect", *words]
        cpu_s = []
        for _ in range(2):
            before = resource.getrusage(resource.RUSAGE_CHILDREN)
            subprocess.run(command, check=True, stderr=subprocess.DEVNULL)
            after = resource.getrusage(resource.RUSAGE_CHILDREN)
            cpu_s.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
        with contextlib.closing(sqlite3.connect(Path(folder, "run", "ledger.sqlite"))) as database:
            answers, cost, sent, received = database.execute(
                "SELECT count(*), sum(nano), min(sent), max(received) FROM responses"
            ).fetchone()
            account = database.execute(
                "SELECT spent_nano, reserved_nano, lost_nano, (SELECT sum(attempts) FROM requests) FROM account"
            ).fetchone()
        if (answers, *account) != (count, cost, 0, 0, count):
            raise SystemExit(f"{answers} answers that cost {cost}, of {count} requests: the account says {account}")
    name = f"collect, {workers} {'process' if workers == 1 else 'processes'}"
    return Measured(name, count / (received - sent), 1000 * (cpu_s[0] - cpu_s[1]) / count)


def main() -> None:
    """Prints a table, the best of the rounds for each way."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=4000)
    parser.add_argument("--in-flight", type=int, default=256)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--write", action="store_true", help="write the table to benchmarks/results/collect.md")
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
    text = table(list(best.values()), count, arguments.in_flight)
    print(text)
    if arguments.write:
        path = Path(__file__).with_name("results") / "collect.md"
        how = f"`python benchmarks/collect.py` at commit {commit()}, load {os.getloadavg()[0]:.1f} at the end"
        path.write_text(f"# Collection, measured\n\n{how}; the best of {arguments.rounds} rounds.\n\n{text}\n")


def table(rows: list[Measured], count: int, in_flight: int) -> str:
    """What was measured, each beside the first row."""
    lines = [
        f"{count:,} requests, {in_flight} in flight, {os.cpu_count()} cores, which the teacher's process shares.",
        "",
        "| way | requests/s | CPU ms/request | times the bare SDK |",
        "|---|---|---|---|",
    ]
    for row in rows:
        ratio = row.requests_per_s / rows[0].requests_per_s
        lines.append(f"| {row.name} | {row.requests_per_s:.0f} | {row.cpu_ms:.2f} | {ratio:.2f} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
