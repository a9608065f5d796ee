"""Memory of the stages that stream: `python benchmarks/streaming.py [--gigabytes 0.3] [--kilobytes 10] [--write]`.

Writes files of a quarter of so many gigabytes and of all of them, in rows of about so many kilobytes: problems of
shared/data/seed_pool said again and again with other numbers and ids, a tenth as they were (so that there are
duplicates to find), each answered by its solution, said again until the row is long enough. Every stage reads them, in
a process of its own: its peak resident memory, by the kernel's count, is what this is about, and by how much it grows
for each byte more that it reads. Processes that a stage starts are apart: `import` runs without verification, and the
stages that ask a model ask the local teacher, which knows none of these problems: what it says is dropped, at the cost
of reading it, at some 300 requests a second. `--stages` leaves stages out; `--write` writes
benchmarks/results/streaming.md.
"""

import argparse
import json
import os
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

from jaxdistill.local_teacher.server import running_teacher
from jaxdistill.manifest import commit
from jaxdistill.records import read_json_objects

ROOT = Path(__file__).parents[1]
POOL = ROOT.parent / "shared" / "data" / "seed_pool" / "raw_pool.jsonl"
EVALUATION_SET = ROOT.parent / "shared" / "data" / "math500" / "math500.jsonl"


def rows(size: float, row_bytes: int) -> Iterator[bytes]:
    """Lines of problems with answers, `size` bytes in all, each of `row_bytes` or a little more."""
    pool, random = [row for _, row in read_json_objects(POOL)], Random(0)
    written, turn = 0, 0
    while written < size:
        for row in pool:
            line = _line(row if random.random() < 0.1 else _renumbered(row, turn), row_bytes)
            yield line
            written += len(line)
            if written >= size:
                return
        turn += 1


def _renumbered(row: dict[str, Any], turn: int) -> dict[str, Any]:
    def other(match: re.Match[str]) -> str:
        return str(int(match[0][:6]) + 7 * turn)

    texts = {name: re.sub(r"\d+", other, row[name]) for name in ("problem", "solution") if row[name]}
    return {**row, **texts, "id": f"{row['id']}-{turn}"}


def _line(row: dict[str, Any], row_bytes: int) -> bytes:
    solution = row["solution"] or "Let us see."
    thought = f"{solution}\nWait, let me check this again.\n" * max(1, row_bytes // (len(solution) + 30))
    response = f"<think>\n{thought}</think>\nThe answer is \\boxed{{{row['answer']}}}."
    values = {"id": row["id"], "prompt": row["problem"], "response": response, "answer": row["answer"]}
    return json.dumps(values).encode() + b"\n"


def _problem(line: bytes) -> bytes:
    """A row of `rows` as a problem whose statement and solution are half of it each."""
    row = json.loads(line)
    half = len(row["response"]) // 2
    statement, solution = row["prompt"] + "\n" + row["response"][:half], row["response"][half:]
    values = {"id": row["id"], "problem": statement, "answer": row["answer"] or "1", "solution": solution}
    return json.dumps(values).encode() + b"\n"


def peak(words: list[str]) -> tuple[float, float]:
    """Peak resident memory in bytes of one command, its workers apart, and its seconds."""
    started = time.perf_counter()
    process = os.posix_spawn(sys.executable, [sys.executable, "-m", "jaxdistill", *words], os.environ)
    _, status, used = os.wait4(process, 0)
    if os.waitstatus_to_exitcode(status) not in (0, 1):  # 1: nothing was kept
        raise SystemExit(f"{words[:2]} ended with status {status}")
    return used.ru_maxrss * 1024, time.perf_counter() - started


ASKING = ("collect", "refine reformat", "refine translate")
STAGES = ("curate", "refine import", "refine select", "refine mix", *ASKING)


def measure(folder: Path, size: float, row_bytes: int, stages: list[str], base_url: str) -> Iterator[tuple[str, float]]:
    """Stage and peak memory in bytes of each."""
    pool, problems, imported = folder / "pool.jsonl", folder / "problems.jsonl", folder / "imported"
    with pool.open("wb") as file, problems.open("wb") as other:
        lines = rows(size, row_bytes)
        count = sum(1 for number, line in enumerate(lines) if file.write(line) and other.write(_renamed(line, number)))
    examples = imported / "examples.jsonl"
    asking = [f"--teacher.base-url={base_url}", "--teacher.in-flight=64"]
    words = {
        "curate": [f"--inputs={pool}", f"--evaluation-sets={EVALUATION_SET}"],
        "refine import": [f"--inputs={pool}", "--no-verify"],
        "refine select": [f"--examples={examples}", f"--count={count // 10}"],
        "refine mix": [f"--examples={examples}"],
        "collect": [f"--problems={problems}", *asking],
        "refine reformat": [f"--problems={problems}", *asking],
        "refine translate": [f"--examples={examples}", *asking],
    }
    for stage in STAGES:
        if stage not in stages and stage != "refine import":  # which makes the examples
            continue
        workdir = imported if stage == "refine import" else folder / stage.replace(" ", "_")
        found, seconds = peak([*stage.split(), *words[stage], f"--workdir={workdir}"])
        print(f"{stage}: {found / 1e6:.0f} MB for {size / 1e6:.0f} MB, {seconds:.0f} s", flush=True)
        if workdir != imported:
            shutil.rmtree(workdir)
        yield stage, found


def _renamed(line: bytes, number: int) -> bytes:
    return _problem(line.replace(b'{"id": "', f'{{"id": "{number}-'.encode(), 1))


def main() -> None:
    """Prints a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=0.3)
    parser.add_argument("--kilobytes", type=float, default=10.0)
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=list(STAGES))
    parser.add_argument("--write", action="store_true")
    arguments = parser.parse_args()
    sizes = (arguments.gigabytes * 1e9 / 4, arguments.gigabytes * 1e9)
    peaks: list[dict[str, float]] = []
    with running_teacher() as base_url:
        for size in sizes:
            with tempfile.TemporaryDirectory(prefix="jaxdistill-streaming-") as name:
                row_bytes = round(arguments.kilobytes * 1e3)
                peaks.append(dict(measure(Path(name), size, row_bytes, arguments.stages, base_url)))
    small, large = (f"{size / 1e6:,.0f} MB" for size in sizes)
    text = f"Rows of {arguments.kilobytes:g} kB.\n"
    text += f"\n| stage | peak memory for {small} | for {large} | bytes more for each byte more |\n|---|---|---|---|"
    for stage, least in peaks[0].items():
        most = peaks[1][stage]
        slope = (most - least) / (sizes[1] - sizes[0])
        text += f"\n| {stage} | {least / 1e6:,.0f} MB | {most / 1e6:,.0f} MB | {slope:.3f} |"
    print(text)
    if arguments.write:
        head = (
            f"# Streams, measured\n\n`python benchmarks/streaming.py` at commit {commit()}, {os.cpu_count()} cores.\n\n"
        )
        (ROOT / "benchmarks" / "results" / "streaming.md").write_text(f"{head}{text}\n", encoding="utf-8")


if __name__ == "__main__":
    main()
