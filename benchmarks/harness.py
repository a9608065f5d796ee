"""lm-evaluation-harness on one model run twice: by `jaxdistill serve`, through HTTP, and by transformers.

python benchmarks/harness.py --model FOLDER --problems gsm8k/test.jsonl --limit 20 --output harness.json

The tasks are those of configs/lm_eval. Prints and writes, for each, the two accuracies and how many problems got the
same text; for the choice, the largest difference of a log-likelihood, in nats. `make test` puts the harness into
.tools/lm_eval.
"""

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
HARNESS = ROOT / ".tools" / "lm_eval"
TASKS = {"gsm8k_file": "exact_match,flexible-extract", "gsm8k_choice": "acc,none"}  # and what counts as right


@contextlib.contextmanager
def serving(model: Path, positions: int) -> Iterator[str]:
    """A server's base URL."""
    options = ["--port", "0", "--name", "served", "--positions", str(positions), "--engine.compute-dtype", "float32"]
    options += ["--engine.slots", "8", "--engine.prefill-tokens", "128"]
    command = [sys.executable, "-m", "jaxdistill", "serve", "--model", str(model), *options]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        try:
            url = process.stdout.readline().strip()
            assert url, "the server did not start"
            yield url
        finally:
            process.terminate()


def run(
    model: str, arguments: dict[str, Any], tasks: list[str], asked: argparse.Namespace, chat: bool = False
) -> dict[str, Any]:
    """What `lm_eval run` gives: `results` and `samples` by task. Generation is greedy.

    Args:
      chat: whether the prompt goes through the chat template.
    """
    from lm_eval import simple_evaluate  # type: ignore[import-not-found]
    from lm_eval.tasks import TaskManager  # type: ignore[import-not-found]

    return simple_evaluate(
        model=model,
        model_args=arguments,
        tasks=tasks,
        task_manager=TaskManager(include_path=str(ROOT / "configs" / "lm_eval"), include_defaults=False),
        limit=asked.limit,
        gen_kwargs=f"max_gen_toks={asked.tokens}",
        apply_chat_template=chat,
        batch_size=1 if model.startswith("local") else 8,
        bootstrap_iters=0,
    )


def compare(served: dict[str, Any], own: dict[str, Any], task: str) -> dict[str, Any]:
    """Of one task: accuracies, and how alike the answers are."""
    metric = TASKS[task]
    pairs = list(zip(*(sorted(r["samples"][task], key=lambda s: s["doc_id"]) for r in (served, own)), strict=True))
    found = {
        "problems": len(pairs),
        "accuracy_served": served["results"][task][metric],
        "accuracy_transformers": own["results"][task][metric],
    }
    if task == "gsm8k_file":
        texts = [tuple(sample["resps"][0][0] for sample in pair) for pair in pairs]
        extracted = [tuple(sample["filtered_resps"][0] for sample in pair) for pair in pairs]
        same = {"same_text": sum(a == b for a, b in texts), "same_answer": sum(a == b for a, b in extracted)}
        return {**found, **same, "characters": sum(len(a) for a, _ in texts)}
    options = [both for pair in pairs for both in zip(*(sample["resps"] for sample in pair), strict=True)]
    values = [tuple(float(one[0][0]) for one in both) for both in options]
    return {
        **found,
        "log_likelihoods": len(values),
        "largest_difference": max(abs(a - b) for a, b in values),
        "average": sum(b for _, b in values) / len(values),
        "greedy_differs": sum(str(a[0][1]) != str(b[0][1]) for a, b in options),
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--problems", type=Path, required=True)
    parser.add_argument("--limit", type=int, default=20)  # problems
    parser.add_argument("--tokens", type=int, default=128)  # at most, of an answer
    parser.add_argument("--positions", type=int, default=1024)
    parser.add_argument("--output", type=Path, required=True)
    asked = parser.parse_args()
    model, output = asked.model.resolve(), asked.output.resolve()
    sys.path.insert(0, str(HARNESS))
    with tempfile.TemporaryDirectory() as scratch:
        os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": f"{scratch}/datasets"}
        (Path(scratch) / "gsm8k.jsonl").symlink_to(asked.problems.resolve())
        with contextlib.chdir(scratch), serving(model, asked.positions) as url:
            served = {"model": "served", "num_concurrent": 8, "max_length": asked.positions}
            by_text = {**served, "base_url": f"{url}/completions", "tokenizer": str(model)}
            by_chat = {**served, "base_url": f"{url}/chat/completions"}
            completions = run("local-completions", by_text, [*TASKS], asked)
            chat = run("local-chat-completions", by_chat, ["gsm8k_file"], asked, chat=True)
        with contextlib.chdir(scratch):
            own = {"pretrained": str(model), "dtype": "float32", "device": "cpu"}
            own_text = run("hf", own, [*TASKS], asked)
            own_chat = run("hf", own, ["gsm8k_file"], asked, chat=True)
    found = {
        "completions": compare(completions, own_text, "gsm8k_file"),
        "chat": compare(chat, own_chat, "gsm8k_file"),
        "choice": compare(completions, own_text, "gsm8k_choice"),
    }
    output.write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
