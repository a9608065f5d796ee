"""How fast a run starts from a large data set that was tokenized before, in what memory, and the wait for a batch.

    .venv/bin/python benchmarks/prepared_data.py [--examples 10000000] [--row-tokens 8192]

A file of examples of 1 kB each is written, and its first 32 MB are tokenized for real (tokens/s are printed). The other
parts are links to that first one: the file repeats itself every 32 MB, so they are what tokenizing would give, byte for
byte. Packing is computed and kept, as a first start does. Then a new process starts as training does: it looks at the
file, maps the parts, reads the packing, deals the epoch, and takes batches of 8 rows. Targets: under 30 s to the first
batch and 2 GB of memory.
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

BATCH_ROWS, BATCHES = 8, 400


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
    from jaxdistill.data import chat, loader

    tokenizer = chat.load_tokenizer(model)
    rows = loader.prepare(path, tokenizer, row_tokens, 1 << 30, cache, show_progress=False)
    rows.fingerprint()
    batches = loader.batches(rows, BATCH_ROWS, epochs=1, seed=0, window=16)
    next(batches)
    first = time.perf_counter() - launched
    waits = []
    for _ in range(BATCHES):
        began = time.perf_counter()
        next(batches)
        waits.append(time.perf_counter() - began)
    return {
        "first_batch_s": first,
        "memory_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
        "batch_ms": 1000 * float(np.median(waits)),
        "rows": len(rows),
    }


def main() -> None:
    """Prints the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--examples", type=int, default=10_000_000)
    parser.add_argument("--row-tokens", type=int, default=8192)
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
        print(f"{count:,} examples, {path.stat().st_size / 1e9:.1f} GB", flush=True)
        tokenizer = chat.load_tokenizer(model)
        parts, *_ = prepared.plan(path, tokenizer, cache)
        stretch, first = parts[0]
        began = time.perf_counter()
        prepared.tokenize(path, tokenizer, stretch, first)
        seconds = time.perf_counter() - began
        made = prepared.Documents([first])
        print(f"tokenizing: {(made.lengths + 1).sum() / seconds:,.0f} tokens/s in one process", flush=True)
        for _, part in parts[1:]:
            os.link(first, part)
        began = time.perf_counter()
        loader.prepare(path, tokenizer, options.row_tokens, 1 << 30, cache, show_progress=False)
        print(f"packing, once: {time.perf_counter() - began:.1f} s", flush=True)
        child = [sys.executable, __file__, "--row-tokens", f"{options.row_tokens}", "--start"]
        for _ in range(3):
            done = subprocess.run([*child, path, model, cache], capture_output=True, text=True, check=True)
            print(done.stdout.strip(), flush=True)


if __name__ == "__main__":
    main()
