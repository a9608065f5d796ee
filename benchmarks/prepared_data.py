"""How fast a run starts from a large data set that was tokenized before, in what memory, and the wait for a batch.

    .venv/bin/python benchmarks/prepared_data.py [--examples 10000000] [--row-tokens 8192] [--write]

A file of examples of 1 kB each is written, and its first 32 MB are tokenized for real (tokens/s are printed). The other
parts are links to that first one: the file repeats itself every 32 MB, so they are what tokenizing would give, byte for
byte. Packing is computed and kept, as a first start does. Then new processes start as training does: each looks at the
file, maps the parts, reads the packing, deals the epoch, and takes batches of 8 rows, first as fast as they come, then
one after each step of an accelerator, which the CPU sleeps through: seconds waited for batches / seconds of steps is
the input wait. A step lasts as long as a model of 1.5 billion weights takes for the 65,536 tokens on eight H100 at 60%
MFU, 6 x 1.5e9 x 65,536 / (0.6 x 8 x 989e12) = 0.124 s: larger models and fewer devices wait less. A process that needs
more private memory than 2 GiB fails (RLIMIT_DATA); pages of the mapped parts, which the system drops where others need
memory, are apart. Targets: under 30 s to the first batch, 2 GiB, and 1% of waiting. `--write` writes
benchmarks/results/prepared_data.md; run it on an idle machine.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import smollm2

from jaxdistill import manifest

ROOT = Path(__file__).parents[1]
BATCH_ROWS, BATCHES = 8, 400
STEP_S, STEPS = 0.124, 100
LIMIT = 2 * 2**30


def write_examples(path: Path, count: int, part_bytes: int) -> int:
    """Writes examples of 1 kB in blocks that the loader takes for a part each; returns how many there are."""
    rng, words = (
        np.random.default_rng(0),
        np.array(["if", "then", "so", "we", "add", "two", "of", "the", "numbers", "and", "check", "it"]),
    )
    lines, size = [], 0
    while size < part_bytes:
        question, answer = (" ".join(rng.choice(words, n)) for n in (30, 160))
        messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        line = json.dumps({"id": f"{len(lines):08}", "messages": messages})
        lines.append((line + " " * max(0, 1023 - len(line)) + "\n").encode())
        size += len(lines[-1])
    block = b"".join(lines)
    blocks = -(-count // len(lines))
    with path.open("wb") as file:
        for _ in range(blocks):
            file.write(block)
    return blocks * len(lines)


def start(path: Path, model: Path, cache: Path, row_tokens: int) -> dict[str, float]:
    """What a process of training does before its first step, apart from the model."""
    launched = time.perf_counter()
    resource.setrlimit(resource.RLIMIT_DATA, (LIMIT, LIMIT))
    from jaxdistill.data import chat, loader

    tokenizer = chat.load_tokenizer(model)
    rows = loader.prepare(path, tokenizer, row_tokens, 1 << 30, cache, show_progress=False)
    rows.fingerprint()
    batches = loader.batches(rows, BATCH_ROWS, epochs=1, seed=0, window=16)
    next(batches)
    first = time.perf_counter() - launched
    began = time.perf_counter()
    for _ in range(BATCHES):
        next(batches)
    batch_s, waited = (time.perf_counter() - began) / BATCHES, 0.0
    for _ in range(STEPS):
        time.sleep(STEP_S)
        began = time.perf_counter()
        next(batches)
        waited += time.perf_counter() - began
    return {
        "first_batch_s": first,
        "private_gib": _status("RssAnon") / 2**30,
        "with_mapped_gib": _status("VmHWM") / 2**30,
        "batch_ms": 1000 * batch_s,
        "input_wait": waited / (STEPS * STEP_S),
    }


def _status(name: str) -> int:
    """Bytes, by the kernel's count for this process."""
    [line] = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(f"{name}:")]
    return 1024 * int(line.split()[1])


def main() -> None:
    """Prints the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--examples", type=int, default=10_000_000)
    parser.add_argument("--row-tokens", type=int, default=8192)
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--start", nargs=3, type=Path, help=argparse.SUPPRESS)  # the child's file, model and cache
    options = parser.parse_args()
    if options.start:
        path, model, cache = options.start
        print(json.dumps(start(path, model, cache, options.row_tokens)))
        return
    from jaxdistill.data import chat, loader, prepared

    model = smollm2.folder()
    with tempfile.TemporaryDirectory(prefix="jaxdistill-prepared-") as folder:
        path, cache = Path(folder) / "examples.jsonl", Path(folder) / "cache"
        count = write_examples(path, options.examples, prepared.PART_BYTES)
        lines = [f"{count:,} examples, {path.stat().st_size / 1e9:.1f} GB, rows of {options.row_tokens:,} tokens."]
        tokenizer = chat.load_tokenizer(model)
        parts, *_ = prepared.plan(path, tokenizer, cache)
        stretch, first = parts[0]
        began = time.perf_counter()
        prepared.tokenize(path, tokenizer, stretch, first)
        seconds = time.perf_counter() - began
        made = prepared.Documents([first])
        lines.append(f"Tokenizing: {(made.lengths + 1).sum() / seconds:,.0f} tokens/s in one process.")
        for _, part in parts[1:]:
            os.link(first, part)
        began = time.perf_counter()
        loader.prepare(path, tokenizer, options.row_tokens, 1 << 30, cache, show_progress=False)
        lines.append(f"Packing, once: {time.perf_counter() - began:.1f} s.")
        child = [sys.executable, __file__, "--row-tokens", f"{options.row_tokens}", "--start"]
        found: list[dict[str, float]] = []
        for _ in range(3):
            done = subprocess.run([*child, path, model, cache], stdout=subprocess.PIPE, text=True, check=True)
            found.append(json.loads(done.stdout))
    columns = "start", "first batch, s", "private memory, GiB", "with mapped pages, GiB", "a batch, ms", "input wait"
    lines += ["", f"| {' | '.join(columns)} |", f"|{'---|' * len(columns)}"]
    for number, one in enumerate(found, start=1):
        lines.append(
            f"| {number} | {one['first_batch_s']:.1f} | {one['private_gib']:.2f} | {one['with_mapped_gib']:.2f} | "
            f"{one['batch_ms']:.1f} | {one['input_wait']:.2%} |"
        )
    text = "\n".join(lines)
    print(text)
    if options.write:
        head = f"# Prepared data, measured\n\n`python benchmarks/prepared_data.py` at commit {manifest.commit()}, "
        head += f"{os.cpu_count()} cores; what the columns say is at the top of that file.\n\n"
        (ROOT / "benchmarks" / "results" / "prepared_data.md").write_text(f"{head}{text}\n", encoding="utf-8")


if __name__ == "__main__":
    main()
