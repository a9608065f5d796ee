"""An evaluation that is killed: the restart samples only what is missing, and its table is that of a whole run."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import tiny

from jaxdistill.evaluate.config import EvaluateConfig
from jaxdistill.sample.request import SamplingConfig

HF, C = tiny.hf_config("qwen3", vocab_size=512), tiny.config("qwen3", vocab_size=512)
CHILD = """
import os, signal, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import jax
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_disable_most_optimizations", True)  # which only saves time here
from jaxdistill.evaluate import run
from test_evaluate_kill import config
folder, most = Path(sys.argv[2]), int(sys.argv[3])
sample, count = run._sample, 0

def dying(plan, left):
    global count
    for completion in sample(plan, left):
        with (folder / "sampled.txt").open("a") as log:
            log.write(completion.id + "\\n")
        count += 1
        if count > most:
            with (plan.folder / "completions.jsonl").open("a") as lines:
                lines.write('{"id": "half a li')
            os.kill(os.getpid(), signal.SIGKILL)
        yield completion

run._sample = dying
run.main(config(folder, folder / "killed"))
run._sample = sample
run.main(config(folder, folder / "undisturbed"))
"""


def config(folder: Path, workdir: Path) -> EvaluateConfig:
    return EvaluateConfig(
        workdir=workdir,
        model=(folder / "one",),
        task="problems",
        path=folder / "problems.jsonl",
        samples=2,
        sampling=SamplingConfig(temperature=1.0, max_new_tokens=8),
        slots=4,
        compute_dtype="float32",
    )


def test_a_killed_evaluation_gives_the_same_table(tmp_path: Path):
    tiny.write_folder(tmp_path / "one", HF, tiny.values(C), C, with_tokenizer=True)
    rows = [{"id": str(i), "problem": f"{i}+{i}", "answer": str(2 * i)} for i in range(4)]
    (tmp_path / "problems.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    paths = [str(Path(__file__).parents[2]), str(Path(__file__).parents[1]), str(Path(__file__).parent)]
    for most, ended in ((3, -signal.SIGKILL), (100, 0)):
        done = subprocess.run(
            [sys.executable, "-c", CHILD, paths[1], str(tmp_path), str(most)],
            env={**os.environ, "PYTHONPATH": os.pathsep.join(paths), "JAX_PLATFORMS": "cpu"},
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == ended, done.stderr
    sampled = (tmp_path / "sampled.txt").read_text().split()
    assert len(sampled) == 8 + 1  # the one that died before it was committed came twice
    for name in ("summary.json", "evaluation.html"):
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "undisturbed" / name).read_bytes(), name
