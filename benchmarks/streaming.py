"""Memory of the stages that stream: `python benchmarks/streaming.py [--gigabytes 5] [--kilobytes 10] [--write]`.

Writes a file of so many gigabytes in rows of about so many kilobytes: problems of shared/data/seed_pool said again and
again with other numbers and ids, a tenth as they were (so that there are duplicates to find), each answered by its
solution, said again until the row is long enough. `curate`, `refine import` and `refine select` read it, each in a
process of its own: its peak resident memory, by the kernel's count, is what this is about; of `import` without
verification, whose workers are processes apart. `--write` writes benchmarks/results/streaming.md.
"""

import argparse
import json
import os
import re
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

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


def peak(words: list[str]) -> tuple[float, float]:
    """Peak resident memory in GB of one command, its workers apart, and its seconds."""
    started = time.perf_counter()
    process = os.posix_spawn(sys.executable, [sys.executable, "-m", "jaxdistill", *words], os.environ)
    _, status, used = os.wait4(process, 0)
    if status:
        raise SystemExit(f"{words[:2]} ended with status {status}")
    return used.ru_maxrss * 1024 / 1e9, time.perf_counter() - started


def main() -> None:
    """Prints a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=5.0)
    parser.add_argument("--kilobytes", type=float, default=10.0)
    parser.add_argument("--write", action="store_true")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="jaxdistill-streaming-") as name:
        folder = Path(name)
        pool = folder / "pool.jsonl"
        with pool.open("wb") as file:
            lines = rows(arguments.gigabytes * 1e9, round(arguments.kilobytes * 1e3))
            count = sum(1 for line in lines if file.write(line))
        imported, selected = folder / "imported", folder / "selected"
        stages = {
            "curate": [f"--inputs={pool}", f"--workdir={folder / 'curated'}", f"--evaluation-sets={EVALUATION_SET}"],
            "refine import": [f"--inputs={pool}", f"--workdir={imported}", "--no-verify"],
            "refine select": [
                *(f"--examples={imported / 'examples.jsonl'}", f"--workdir={selected}", f"--count={count // 10}"),
            ],
        }
        text = f"A file of {pool.stat().st_size / 1e9:.2f} GB, {count:,} problems with answers.\n"
        text += "\n| stage | peak memory | minutes |\n|---|---|---|"
        for stage, words in stages.items():
            gigabytes, seconds = peak([*stage.split(), *words])
            text += f"\n| {stage} | {gigabytes:.2f} GB | {seconds / 60:.1f} |"
            print(stage, f"{gigabytes:.2f} GB", f"{seconds:.0f} s", flush=True)
    print(text)
    if arguments.write:
        head = (
            f"# Streams, measured\n\n`python benchmarks/streaming.py` at commit {commit()}, {os.cpu_count()} cores.\n\n"
        )
        (ROOT / "benchmarks" / "results" / "streaming.md").write_text(f"{head}{text}\n", encoding="utf-8")


if __name__ == "__main__":
    main()
