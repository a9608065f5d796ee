"""What the planner says of Qwen2.5-7B, 32B and 72B on TPUs and H100 that are not here; needs no device.

    .venv/bin/python benchmarks/plan_table.py

For each case the planner searches meshes, remat policies and optimizer states, and compiles the ways that its formulas
rank best until one fits. Documents are as long as the paper's answers, 8,016 tokens on average. The largest case takes
a quarter of an hour on 2 CPU cores. Each case is written to benchmarks/results/plan.json and plan.md as it ends, with
the commit and the versions that it was planned by; `--cases 7B:v5e:4x4:32768` plans some, `--missing` those that no row
is there for. H100 need jax's CUDA plugin: run those by the interpreter of `make test-newest`.
"""

import argparse
import dataclasses
import json
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxdistill import manifest
from jaxdistill.errors import RunError, UserError
from jaxdistill.plan import hardware, run
from jaxdistill.plan.run import Plan, PlanConfig
from jaxdistill.train.config import TrainConfig

RESULTS = Path(__file__).parent / "results"
STEP_TOKENS, DOCUMENT_TOKENS = 2**21, 8016.0
_GIB = 2**30
Case = tuple[str, str, int]  # model, hardware, tokens of a row
# hidden, mlp, layers, heads, key/value heads; untied, 152,064 words
SHAPES = {
    "7B": (3584, 18_944, 28, 28, 4),
    "32B": (5120, 27_648, 64, 40, 8),
    "72B": (8192, 29_568, 80, 64, 8),
}
CASES: tuple[Case, ...] = (
    ("7B", "v5e:4x4", 32_768),
    ("7B", "v5e:8x8", 131_072),
    ("7B", "v6e:8x8", 32_768),
    ("7B", "v5p:4x4x4", 131_072),
    ("32B", "v5e:16x16", 32_768),
    ("32B", "v6e:8x8", 32_768),
    ("32B", "v6e:16x16", 131_072),
    ("32B", "v5p:4x4x4", 131_072),
    ("72B", "v5p:4x4x4", 32_768),
    ("72B", "v5p:4x8x8", 32_768),
    ("72B", "v5p:4x8x8", 131_072),
    ("72B", "v6e:16x16", 32_768),
    ("72B", "tpu7x:4x4x4", 32_768),
    ("72B", "tpu7x:4x4x4", 131_072),
    ("7B", "h100", 32_768),
    ("7B", "h100x8", 32_768),
    ("32B", "h100x64", 32_768),
    ("72B", "h100x128", 32_768),
)
HEADER = ("model", "hardware", "row tokens", "mesh", "remat", "state", "GiB a device", "s a step", "MFU", "bound by")


def write_model(folder: Path, name: str, positions: int) -> Path:
    """A folder with the config.json of a Qwen2.5 whose context has been extended to so many positions."""
    embed, mlp, layers, heads, kv_heads = SHAPES[name]
    config = {
        "model_type": "qwen2",
        "hidden_size": embed,
        "intermediate_size": mlp,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": 152_064,
        "max_position_embeddings": positions,
        "rope_theta": 1e6,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False,
        "hidden_act": "silu",
    }
    manifest.write_json(folder / "config.json", config)
    return folder


def plan(name: str, target: str, row_tokens: int, folder: Path) -> dict[str, Any]:
    """One case: the fastest way that fits, or why there is none."""
    train = TrainConfig(
        workdir=folder / "run",
        model=write_model(folder / name, name, row_tokens),
        row_tokens=row_tokens,
        batch_rows=STEP_TOKENS // row_tokens,
    )
    config = PlanConfig(train=train, hardware=target, document_tokens=DOCUMENT_TOKENS, search=True, compiled=1)
    case: dict[str, Any] = {"model": name, "hardware": target, "row_tokens": row_tokens}
    started = time.perf_counter()
    try:
        case |= outcome(run.main(config)[0], target)
    except (RunError, UserError) as error:
        case["problem"] = str(error)
    return case | {"wall_s": round(time.perf_counter() - started, 1)}


def outcome(best: Plan, target: str) -> dict[str, Any]:
    """What the table says of a way that fits."""
    assert best.step is not None
    step, estimate = best.config.step, best.estimate
    state = best.config.phases[0].optim.state_dtype + (" on the host" if step.offload_moments else "")
    return {
        "mesh": best.sizes,
        "remat": step.remat,
        "accumulate": step.accumulate,
        "state": state,
        "memory": dataclasses.asdict(best.step.memory) | {"total": best.step.memory.total},
        "usable_bytes": hardware.parse(target).device_memory,
        "step_s": estimate.step_s,
        "fastest_s": estimate.fastest_s,
        "slowest_s": estimate.slowest_s,
        "mfu": estimate.mfu,
        "bound": estimate.bound,
        "compile_s": best.step.compile_s,
    }


def row(case: dict[str, Any]) -> tuple[str, ...]:
    """A line of the table."""
    first = (case["model"], case["hardware"], f"{case['row_tokens']:,}")
    if "problem" in case:
        return (*first, case["problem"], *[""] * (len(HEADER) - 4))
    mesh = " x ".join(f"{axis} {size}" for axis, size in case["mesh"].items() if size > 1)
    held = f"{case['memory']['total'] / _GIB:.1f} of {case['usable_bytes'] / _GIB:.1f}"
    speed = (f"{case['step_s']:.1f} ({case['fastest_s']:.1f} to {case['slowest_s']:.1f})", f"{case['mfu']:.0%}")
    return (*first, mesh, case["remat"], case["state"], held, *speed, case["bound"])


def table(cases: list[dict[str, Any]]) -> str:
    """All cases in Markdown."""
    lines = [HEADER, ("---",) * len(HEADER), *map(row, cases)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def read() -> list[dict[str, Any]]:
    """The cases that were planned before."""
    path = RESULTS / "plan.json"
    return json.loads(path.read_text(encoding="utf-8"))["cases"] if path.is_file() else []


def key(case: Mapping[str, Any]) -> Case:
    return case["model"], case["hardware"], case["row_tokens"]


def write(new: dict[str, Any]) -> None:
    """Puts a case in its place among the others; the table's order is that of CASES, others come last."""
    cases = {key(case): case for case in read()} | {key(new): new}
    ordered = [cases[one] for one in (*CASES, *(cases.keys() - set(CASES))) if one in cases]
    facts = {"step_tokens": STEP_TOKENS, "document_tokens": DOCUMENT_TOKENS}
    manifest.write_json(RESULTS / "plan.json", facts | {"cases": ordered})
    about = (
        "`benchmarks/plan_table.py`; plan.json says which commit and versions planned each case. "
        f"{STEP_TOKENS:,} tokens a step, documents of {DOCUMENT_TOKENS:,.0f}. "
        "Memory is the compiler's; times are a roofline with assumed efficiencies (from all communication hidden to "
        "none), measured nowhere."
    )
    text = f"# Plans for TPUs and H100 that are not here\n\n{about}\n\n{table(ordered)}\n"
    (RESULTS / "plan.md").write_text(text, encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", default=[], help="MODEL:HARDWARE:ROW_TOKENS, as 7B:v5e:4x4:32768")
    parser.add_argument("--missing", action="store_true", help="only those that no row is there for")
    asked = parser.parse_args()
    parts = [(case.split(":", 1)[0], *case.split(":", 1)[1].rsplit(":", 1)) for case in asked.cases]
    cases: Sequence[Case] = [(name, target, int(row_tokens)) for name, target, row_tokens in parts] or CASES
    planned = {key(case) for case in read()} if asked.missing else set()
    versions = {k: v for k, v in manifest.versions().items() if k in ("python", "jax", "jaxlib", "libtpu", "tokamax")}
    made_by = {"commit": manifest.commit(), "versions": versions}  # before the first row changes what is committed
    for name, target, row_tokens in cases:
        if (name, target, row_tokens) in planned:
            continue
        with tempfile.TemporaryDirectory() as folder:
            found = plan(name, target, row_tokens, Path(folder))
        print(json.dumps(found), flush=True)
        write(found | made_by)
    print(table(read()))


if __name__ == "__main__":
    main()
