"""The demo over several seeds, with the ablation: is the gain the chains' and is it more than noise?

    .venv/bin/python benchmarks/demo_seeds.py [SEED ...]        (three seeds by default)

Writes benchmarks/results/demo.{json,md}: accuracy per stage, mean and spread over seeds, from each run's summary.json.
"""

import json
import os
import platform
import statistics
import subprocess
import sys
from pathlib import Path

from jaxdistill import manifest

ROOT = Path(__file__).parents[1]
STAGES = ("base", "phase1", "phase2", "answers_only")


def main(seeds: list[str]) -> None:
    """Runs what is missing and writes the table."""
    summaries = []
    for seed in seeds:
        workdir = ROOT / "runs" / f"demo-seed-{seed}"
        words = ["demo", "--workdir", str(workdir), "--seed", seed, "--answers-only"]
        subprocess.run([sys.executable, "-m", "jaxdistill", *words], check=True)
        summaries.append(json.loads((workdir / "summary.json").read_text()))
    lines = [
        "# Demo: accuracy on held-out problems",
        "",
        (
            f"Command: `.venv/bin/python benchmarks/demo_seeds.py {' '.join(seeds)}`; commits: "
            f"{', '.join(sorted({s['commit'] for s in summaries}))}; {os.cpu_count()} cores, {platform.machine()}; "
            f"wall time with the ablation {', '.join(str(round(s['wall_s'])) for s in summaries)} s."
        ),
        "",
        f"| model | {' | '.join(f'seed {seed}' for seed in seeds)} | mean | spread (max - min) | average tokens |",
        "|---|" + "---|" * (len(seeds) + 3),
    ]
    for stage in STAGES:
        values = [s["accuracy"][stage] for s in summaries]
        intervals = [s["interval"][stage] for s in summaries]
        shown = [f"{v:.1%} [{low:.1%}, {high:.1%}]" for v, (low, high) in zip(values, intervals, strict=True)]
        over = f"{statistics.mean(values):.1%} | {max(values) - min(values):.1%}"
        tokens = statistics.mean(s["average_tokens"][stage] for s in summaries)
        lines.append(f"| {stage} | {' | '.join(shown)} | {over} | {tokens:.0f} |")
    text = "\n".join(lines) + "\n"
    (ROOT / "benchmarks/results/demo.md").write_text(text, encoding="utf-8")
    manifest.write_json(ROOT / "benchmarks/results/demo.json", summaries)
    print(text)


if __name__ == "__main__":
    main(sys.argv[1:] or ["0", "1", "2"])
