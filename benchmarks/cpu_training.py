"""A training step of SmolLM2-135M on this CPU in float32: ours against transformers and torch, in the same run.

    .venv/bin/python benchmarks/cpu_training.py [--row-tokens 2048] [--rounds 5]

Both train on the same rows, one document each of ../shared/data/long_thought cut to the row, with AdamW and gradients
clipped to 1, and their losses are compared. Each side is tried in several ways, one at a time; then the fastest of
either side take turns, so that the noise of the machine falls on both. Every way has a process of its own, whose peak
memory is read from VmHWM. Writes benchmarks/results/cpu_training.{json,md}.
"""

import argparse
import itertools
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import smollm2

from jaxdistill import manifest, records
from jaxdistill.errors import RunError, UserError

ROOT = Path(__file__).parents[1]
DATA = ROOT.parent / "shared" / "data" / "long_thought" / "r1_distill_qwen32b_limo.jsonl"
OURS = ("ours, remat none", "ours, remat matmuls", "ours, remat attention")
THEIRS = ("torch, fused AdamW", "torch, foreach AdamW", "torch, fused AdamW, checkpointing")
LEARNING_RATE, BETAS, EPS, WEIGHT_DECAY = 1e-5, (0.9, 0.95), 1e-8, 0.1
TRIAL_STEPS = 3  # after the first, which compiles
LARGEST_DIFFERENCE = 1e-3  # of losses: both sides do the same work
Step = Callable[[np.ndarray], float]  # tokens [T + 1] -> loss

FORMULAS = (
    "tokens/s = row tokens / median seconds of a step, the first step left out. Ratio of tokens/s = ours / theirs; of "
    "peak memory = ours / theirs, VmHWM of the processes, all of python and the libraries included. Start to first "
    "step: from the start of the process to the end of its first step, weights read from disk and all compiled; in "
    "turns, what jax compiled alone before comes from its cache."
)


def our_step(model: Path, row_tokens: int, peak_lr: float = LEARNING_RATE, **how: Any) -> Step:
    """The step that `jaxdistill train` runs.

    Args:
      how: fields of StepConfig.
    """
    import jax

    from jaxdistill import hf, optim, runtime, sharding
    from jaxdistill.data import packing
    from jaxdistill.models import decoder
    from jaxdistill.models.attention import REFERENCE
    from jaxdistill.train import step as train_step

    runtime.start()
    jax.set_mesh(sharding.MeshConfig().build())
    params, c = hf.load(model)
    settings = optim.OptimConfig(
        peak_lr=peak_lr,
        schedule="constant",
        warmup_fraction=0,
        b1=BETAS[0],
        b2=BETAS[1],
        eps=EPS,
        weight_decay=WEIGHT_DECAY,
    )
    optimizer = optim.make(settings, 1000, decoder.template(c))
    step = train_step.make_step(train_step.StepConfig(**how), REFERENCE, c, optimizer)
    states = [train_step.new_state(params, optimizer, seed=0)]
    del params

    def run(tokens: np.ndarray) -> float:
        row = packing.make_row([packing.Document("row", tokens, np.ones(len(tokens), bool), 1.0)], row_tokens)
        state, values = step(states.pop(), train_step.place(jax.tree.map(lambda x: x[None], row), 1))
        states.append(state)
        return float(jax.block_until_ready(values["loss"]))

    return run


def their_step(model: Path, fused: bool, checkpointing: bool) -> Step:
    """transformers' model with its default attention (torch's scaled_dot_product_attention) and torch's AdamW."""
    import torch
    import transformers

    net = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32, attn_implementation="sdpa")
    net.train()
    if checkpointing:
        net.gradient_checkpointing_enable({"use_reentrant": False})
    how: dict[str, Any] = {"fused": True} if fused else {"foreach": True}
    matrices = [w for w in net.parameters() if w.ndim > 1]
    scales = [w for w in net.parameters() if w.ndim == 1]
    groups = [{"params": matrices, "weight_decay": WEIGHT_DECAY}, {"params": scales, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=LEARNING_RATE, betas=BETAS, eps=EPS, **how)

    def run(tokens: np.ndarray) -> float:
        row = torch.from_numpy(tokens.astype(np.int64))[None]
        logits = net(input_ids=row[:, :-1], use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(logits[0], row[0, 1:])
        del logits
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0, foreach=True)
        optimizer.step()
        return float(loss)

    return run


def worker(way: str, model: Path, row_tokens: int) -> None:
    """Does a step for every line of standard input, the index of a row, and answers with seconds and loss."""
    rows = np.load(os.environ["BENCHMARK_ROWS"])
    if way in OURS:
        step = our_step(model, row_tokens, compute_dtype="float32", remat=way.split()[-1])
    else:
        step = their_step(model, "fused" in way, "checkpointing" in way)
    for line in sys.stdin:
        started = time.perf_counter()
        loss = step(rows[int(line)])
        answer = {"seconds": time.perf_counter() - started, "loss": loss, "peak": peak_bytes()}
        print("answer " + json.dumps(answer), flush=True)


def peak_bytes() -> int:
    """The most memory that this process has held."""
    [line] = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM:")]
    return int(line.split()[1]) * 1024


class Process:
    """A way to train, in a process of its own."""

    def __init__(self, way: str, model: Path, rows: Path, row_tokens: int):
        self.way, self.seconds, self.losses, self.peak = way, [], [], 0
        command = [sys.executable, __file__, "--way", way, "--model", str(model), "--row-tokens", str(row_tokens)]
        pipes: Any = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        started = time.perf_counter()
        own = {"BENCHMARK_ROWS": str(rows), "JAX_COMPILATION_CACHE_DIR": str(rows.with_name("xla"))}
        self._process = subprocess.Popen(command, env={**os.environ, **own}, **pipes)
        self.step()
        self.start_s = time.perf_counter() - started
        self.seconds.clear()

    def step(self) -> None:
        """One step on the next row."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(f"{len(self.losses)}\n")
        self._process.stdin.flush()
        answers = (line for line in self._process.stdout if line.startswith("answer "))
        answer = json.loads(next(answers, "answer null").removeprefix("answer "))
        if answer is None:
            raise RunError(f"{self.way}: the process ended with exit code {self._process.wait()}")
        self.seconds.append(answer["seconds"])
        self.losses.append(answer["loss"])
        self.peak = answer["peak"]

    def end(self) -> None:
        """Ends the process and waits for it."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()

    def facts(self, row_tokens: int) -> dict[str, Any]:
        """What was measured."""
        rate = row_tokens / statistics.median(self.seconds)
        return {"tokens_per_s": rate, "peak_gib": self.peak / 2**30, "start_to_first_step_s": self.start_s} | {
            "step_s": self.seconds,
            "losses": self.losses,
        }


def input_pipeline(model: Path, row_tokens: int) -> dict[str, float]:
    """Tokens/s of tokenizing and packing the real chains, and of dealing packed rows to steps, with no training."""
    from jaxdistill.curate.examples import example
    from jaxdistill.data import chat, loader
    from jaxdistill.records import Problem

    rows = [row for _, row in records.read_json_objects(DATA)]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "examples.jsonl"
        records.write_jsonl(
            path, (example(Problem(id=r["id"], problem=r["problem"]), r["response"], suffix="chain") for r in rows)
        )
        tokenizer = chat.load_tokenizer(model)
        started = time.perf_counter()
        packed = loader.prepare(path, tokenizer, 4 * row_tokens, 1 << 30, Path(folder) / "cache", show_progress=False)
        prepared_s = time.perf_counter() - started
        tokens = packed.lengths.sum() + sum(receipt["tokens"] for receipt in packed.dropped)
        epochs = 20
        started = time.perf_counter()
        dealt = sum(dealt.tokens for dealt in loader.batches(packed, 8, epochs, seed=0, window=16))
    return {"prepare": tokens / prepared_s, "deal": dealt / (time.perf_counter() - started)}


def rows_of(model: Path, row_tokens: int, count: int) -> np.ndarray:
    """The first tokens of real chains [count, T + 1]."""
    from jaxdistill.data import chat

    tokenizer = chat.load_tokenizer(model)
    texts = (row["problem"] + row["response"] for _, row in records.read_json_objects(DATA))
    tokens = (tokenizer(text).input_ids for text in texts)
    long_enough = (ids[: row_tokens + 1] for ids in tokens if len(ids) > row_tokens)
    return np.array(list(itertools.islice(long_enough, count)), np.int32)


def measure(model: Path, row_tokens: int, rounds: int) -> dict[str, Any]:
    """All ways one at a time, then the fastest of either side in turns."""
    with tempfile.TemporaryDirectory() as folder:
        rows = Path(folder) / "rows.npy"
        np.save(rows, rows_of(model, row_tokens, 1 + max(rounds, TRIAL_STEPS)))
        tried: dict[str, Any] = {}
        for way in (*OURS, *THEIRS):
            process = Process(way, model, rows, row_tokens)
            for _ in range(TRIAL_STEPS):
                process.step()
            process.end()
            tried[way] = process.facts(row_tokens)
            print(f"{way}: {tried[way]['tokens_per_s']:.1f} tokens/s, {tried[way]['peak_gib']:.2f} GiB", flush=True)
        best = [max(ways, key=lambda way: tried[way]["tokens_per_s"]) for ways in (OURS, THEIRS)]
        ours, theirs = (Process(way, model, rows, row_tokens) for way in best)
        for _ in range(rounds):
            ours.step()
            theirs.step()
        ours.end()
        theirs.end()
    off = np.abs(np.subtract(ours.losses, theirs.losses)).max()
    if off > LARGEST_DIFFERENCE:
        raise RunError(f"losses differ by {off:.2g}, so the sides do not do the same: {ours.losses}, {theirs.losses}")
    turns = {process.way: process.facts(row_tokens) for process in (ours, theirs)}
    leanest = min(tried[way]["peak_gib"] for way in THEIRS)
    return {
        "tried alone": tried,
        "in turns": turns,
        "ratio of tokens/s": turns[ours.way]["tokens_per_s"] / turns[theirs.way]["tokens_per_s"],
        "ratio of peak memory": ours.peak / theirs.peak,
        "ratio of peak memory to their leanest way": ours.peak / 2**30 / leanest,
        "largest difference of losses": float(off),
    }


def write(found: dict[str, Any], pipeline: dict[str, float], row_tokens: int, rounds: int) -> None:
    """The measured table, for people and for programs."""
    import torch

    versions = {**manifest.versions(), "torch": torch.__version__}
    facts = {
        "commit": manifest.commit(),
        "device": f"{os.cpu_count()} {platform.machine()} cores",
        "versions": ", ".join(f"{name} {versions[name]}" for name in ("jax", "torch", "transformers")),
        "input pipeline alone, tokenize and pack, tokens/s": round(pipeline["prepare"]),
        "input pipeline alone, deal packed rows, tokens/s": round(pipeline["deal"]),
    }
    facts |= {name: f"{value:.3g}" for name, value in found.items() if isinstance(value, float)}
    manifest.write_json(ROOT / "benchmarks/results/cpu_training.json", {**facts, **found, "formulas": FORMULAS})
    lines = [
        f"# SmolLM2-135M, one row of {row_tokens:,} tokens, float32, on a CPU",
        "",
        "`.venv/bin/python benchmarks/cpu_training.py`. " + FORMULAS,
        "",
        "| fact | value |",
        "|---|---|",
        *(f"| {name} | {value} |" for name, value in facts.items()),
        "",
        "| way | measured | tokens/s | peak memory, GiB | start to first step, s |",
        "|---|---|---|---|---|",
    ]
    for how, ways in (("alone, 3 steps", found["tried alone"]), (f"in turns, {rounds} steps", found["in turns"])):
        lines += [
            f"| {way} | {how} | {w['tokens_per_s']:.1f} | {w['peak_gib']:.2f} | {w['start_to_first_step_s']:.1f} |"
            for way, w in ways.items()
        ]
    (ROOT / "benchmarks/results/cpu_training.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    print("\n".join(lines))


def main() -> None:
    """Measures and writes, or is one of the processes."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--row-tokens", type=int, default=2048)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--way", help="for the processes that this command starts")
    parser.add_argument("--model", type=Path)
    asked = parser.parse_args()
    if asked.way:
        return worker(asked.way, asked.model, asked.row_tokens)
    if not DATA.is_file():
        raise UserError(f"{DATA} is not there; expected the real chains beside the checkout")
    model = smollm2.folder()
    found = measure(model, asked.row_tokens, asked.rounds)
    write(found, input_pipeline(model, asked.row_tokens), asked.row_tokens, asked.rounds)


if __name__ == "__main__":
    try:
        main()
    except (UserError, RunError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2 if isinstance(error, UserError) else 1) from None
