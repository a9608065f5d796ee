"""Conversion under a memory limit: a random model from a Hugging Face folder to a checkpoint and back, disk to disk.

    .venv/bin/python benchmarks/conversion.py [--layers 36] [--limit-gb 6] [--folder FOLDER]

The shape is Qwen3-8B's in bfloat16, 16.4 GB; fewer layers make a smaller one. `import` and `export` run as users run
them, with everything they check, each in a process that may not have more private memory than the limit (RLIMIT_DATA),
whose peak resident memory (VmHWM) is reported. Then every tensor of the export is compared with what was written in the
beginning. Twice the model's size must be free on the disk; all of it is removed. Writes
benchmarks/results/conversion.md.
"""

import argparse
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
import zlib
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from jaxdistill import hf, manifest
from jaxdistill.demo import student
from jaxdistill.hf_tensors import Stacked, Tensors, differing
from jaxdistill.models import decoder, family

ROOT = Path(__file__).parents[1]
QWEN3_8B = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "vocab_size": 151_936,
    "hidden_size": 4096,
    "intermediate_size": 12_288,
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 40_960,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1_000_000,
    "tie_word_embeddings": False,
    "dtype": "bfloat16",
}


DTYPE = ml_dtypes.bfloat16


class Random:
    """Tensors of bfloat16 numbers that their names decide: about 0.01 to 0.03 large, of either sign."""

    def __init__(self, template: decoder.Params):
        self.template, self._shapes = template, Stacked(template, lambda leaf, index: np.zeros(0)).shapes()

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of every tensor."""
        return self._shapes

    def __getitem__(self, name: str) -> np.ndarray:
        shape = self._shapes[name]
        bits = np.random.default_rng(zlib.crc32(name.encode())).integers(0, 2**16, shape, np.uint16)
        bits &= 0x80FF  # the sign, and one bit of the exponent
        bits |= 0x3C00
        return bits.view(DTYPE)

    def rows(self, name: str, start: int, stop: int) -> np.ndarray:
        """A part of a tensor."""
        return self[name][start:stop]


def limited(words: list[str], limit_bytes: int) -> tuple[float, int]:
    """Seconds and peak resident bytes of a command that may not have more private memory than the limit."""
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    start, peak = time.monotonic(), 0
    command = ["bash", "-c", 'ulimit -d "$0" && exec "$@"', str(limit_bytes // 1024)]  # in KiB
    process = subprocess.Popen([*command, sys.executable, "-m", "jaxdistill", *words], env=environment)
    while process.poll() is None:
        peak = max(peak, _peak(process.pid))
        time.sleep(0.2)
    if process.returncode:
        raise SystemExit(f"`jaxdistill {' '.join(words)}` ended with {process.returncode}")
    return time.monotonic() - start, peak


def _peak(pid: int) -> int:
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:  # it has ended
        return 0
    lines = [line for line in status.splitlines() if line.startswith("VmHWM:")]
    return 1024 * int(lines[0].split()[1]) if lines else 0


def write_model(folder: Path, values: dict[str, Any]) -> Random:
    """A Hugging Face folder of a random Qwen3 of that config.json, with a tokenizer; returns its tensors."""
    random = Random(decoder.template(family("qwen3").config(values)))
    hf.write(folder, random, values)
    with tempfile.TemporaryDirectory() as of_tokenizer:
        student.write(Path(of_tokenizer), ["What is 6 * 7?"] * 100, seed=0)
        hf.copy_companions(Path(of_tokenizer), folder)
    return random


def convert(folder: Path, values: dict[str, Any], limit_bytes: int) -> dict[str, Any]:
    """Both ways, below `folder`; what is no longer needed is removed on the way."""
    source, imported, exported = (folder / name for name in ("source", "imported", "exported"))
    random = write_model(source, values)
    size = sum(path.stat().st_size for path in source.glob("*.safetensors"))
    largest = 2 * max(int(np.prod(shape)) for shape in random.shapes().values())
    inward = limited(["import", "--model", str(source), "--workdir", str(imported)], limit_bytes)
    shutil.rmtree(source)
    outward = limited(["export", "--model", str(imported), "--workdir", str(exported)], limit_bytes)
    check = [line for line in (exported / "README.md").read_text().splitlines() if line.startswith("Check of")]
    with Tensors(exported) as tensors:
        wrong = differing(tensors, random, random.template, DTYPE)
    if wrong:
        raise SystemExit(f"these tensors are not what they were: {', '.join(wrong)}")
    return {"size": size, "largest": largest, "import": inward, "export": outward, "check": check[0]}


def main() -> None:
    """Converts, prints and writes the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--layers", type=int, default=36)
    parser.add_argument("--limit-gb", type=float, default=6.0)
    parser.add_argument("--folder", type=Path, default=None)
    asked = parser.parse_args()
    values = {**QWEN3_8B, "num_hidden_layers": asked.layers}
    with tempfile.TemporaryDirectory(dir=asked.folder) as folder:
        found = convert(Path(folder), values, int(asked.limit_gb * 1e9))
    lines = [
        f"# Conversion of a model of {found['size'] / 1e9:.1f} GB under a limit of {asked.limit_gb:g} GB",
        "",
        (
            f"`.venv/bin/python benchmarks/conversion.py --layers {asked.layers} --limit-gb {asked.limit_gb:g}` at "
            f"{manifest.commit()}, {os.cpu_count()} {platform.machine()} cores."
        ),
        (
            f"The largest tensor is {found['largest'] / 1e9:.2f} GB, files are of 2 GB. Time and memory are those of "
            "the whole command, its checks included; memory is VmHWM."
        ),
        "Every tensor of the export equals, bit for bit, what was imported.",
        "",
        "| command | seconds | GB of peak memory |",
        "|---|---|---|",
        *(f"| {name} | {found[name][0]:.0f} | {found[name][1] / 1e9:.2f} |" for name in ("import", "export")),
        "",
        found["check"],
        "",
    ]
    (ROOT / "benchmarks" / "results" / "conversion.md").write_text("\n".join(lines))
    print("\n".join(lines))


if __name__ == "__main__":
    main()
