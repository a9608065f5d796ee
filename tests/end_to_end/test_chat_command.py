"""`jaxdistill chat` with its input from a pipe: it says what `sample` says, remembers, folds what is thought."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import tiny

from jaxdistill.data import chat
from jaxdistill.sample import run as sample
from jaxdistill.sample.request import SamplingConfig

HF = tiny.hf_config("qwen3", vocab_size=263)
C = tiny.config("qwen3", vocab_size=263)
CUT_OFF = " (cut off: max_new_tokens or the model's positions are used up)"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_folder(tmp_path_factory.mktemp("hf") / "hf", HF, tiny.values(C), C, with_tokenizer=True)


def talk(model: Path, *lines: str) -> list[str]:
    """What it writes after these lines."""
    words = ["--model", str(model), "--compute-dtype", "float32"]
    words += ["--sampling.temperature", "0", "--sampling.max-new-tokens", "12"]
    done = subprocess.run(
        [sys.executable, "-m", "jaxdistill", "chat", *words],
        input="".join(line + "\n" for line in lines),
        capture_output=True,
        text=True,
        timeout=600,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.split(CUT_OFF + "\n")


def test_it_says_what_sample_says_and_remembers(model: Path, tmp_path: Path):
    config = sample.SampleConfig(
        workdir=tmp_path / "run",
        model=model,
        prompts=("1+1",),
        sampling=SamplingConfig(max_new_tokens=12),
        compute_dtype="float32",
    )
    tokenizer = chat.load_tokenizer(model)
    [row] = sample.main(config)
    expected = tokenizer.decode(tokenizer(row["text"])["input_ids"], skip_special_tokens=True)
    shown = "".join(c for c in expected if c >= " " or c in "\n\t")
    first, second, third, too_long = talk(model, "1+1", "1+1", "/new", "1+1", "x" * 300, "/quit", "1+1")
    assert first == third == shown
    assert second != first, "the second time there is a first time before it"
    assert "expected 1 to 255" in too_long
    assert too_long.endswith("/new starts again\n")


def test_reasoning_is_folded(model: Path):
    """The template opens the thoughts, and this model never closes them."""
    tokenizer = chat.load_tokenizer(model)
    tokenizer.chat_template = tokenizer.chat_template.replace(
        "assistant\n' }}{% endif", "assistant\n<think>' }}{% endif"
    )
    folder = model.with_name("thinker")
    folder.mkdir()
    for path in model.iterdir():
        (folder / path.name).symlink_to(path)
    for path in tokenizer.save_pretrained(str(model.with_name("tokenizer"))):
        (folder / Path(path).name).unlink(missing_ok=True)
        (folder / Path(path).name).symlink_to(path)
    answer, thoughts = talk(folder, "1+1", "/thoughts")
    assert answer == ""
    assert thoughts.strip()
