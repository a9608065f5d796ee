"""The site builds without a broken link, and every command in README.md and docs/ is run, or at least read.

A fenced `bash` block is run as it stands, all blocks of a page in one shell, on a tiny model and the local teacher. Two
marks, which no reader sees, change that: `<!-- only parsed -->` before a block has the command line's own parser read
its commands, `<!-- in the test: COMMAND -->` runs something more at that place. A titled `python` block is a file.
"""

import os
import re
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from jaxdistill import cli, records
from jaxdistill.demo import student
from jaxdistill.errors import UserError
from jaxdistill.local_teacher import problems
from jaxdistill.local_teacher.answers import Faults
from jaxdistill.local_teacher.server import TeacherOptions, running_teacher

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
SITE_PACKAGES = ROOT / ".tools" / "docs"

# How many commands of a page are only parsed. They need hardware, an API or data that are not here, or hours: see
# whether a new one cannot be run before you raise a number.
PARSED = {
    "README.md": 8,
    "budget.md": 1,
    "evaluate.md": 1,
    "experiments.md": 7,
    "one_gpu.md": 4,
    "slurm.md": 10,
    "tpu_pod.md": 10,
}
# Commands of other programs, which are neither run nor parsed, by their first words.
OTHERS = {
    "README.md": {"make demo", "make test"},
    "evaluate.md": {
        "lm_eval run --model local-chat-completions",
        "lm_eval run --model local-completions",
    },
    "index.md": {"make demo"},
    "one_gpu.md": {
        "hf download Qwen/Qwen2.5-1.5B-Instruct --local-dir",
        "pip install -e .[cuda13]",
    },
    "slurm.md": {"sbatch runs/job/slurm.sbatch", "sbatch runs/sweep_data_size/job/slurm.sbatch"},
    "tpu_pod.md": {"kubectl apply -f runs/job/jobset.yaml"},
}

_PROGRAMS = ("gcloud", "hf", "kubectl", "lm_eval", "make", "pip", "sbatch", "sky", "squeue")
_BLOCK = re.compile(
    r"^<!-- in the test: (?P<hidden>.*?) -->$"
    r"|^(?P<parsed><!-- only parsed -->\n)?```(?P<kind>[^\n]*)\n(?P<text>.*?)^```$",
    re.MULTILINE | re.DOTALL,
)


def script(page: str) -> str:
    """One bash script of all that a page says, in order."""
    lines = ["set -euo pipefail"]
    for found in _BLOCK.finditer(page):
        kind, text = found["kind"], found["text"]
        if found["hidden"]:
            lines.append(found["hidden"])
        elif kind == "bash":
            lines += ["export ONLY_PARSED=yes" if found["parsed"] else "unset ONLY_PARSED", text]
        elif title := re.fullmatch(r'python title="(.+)"', kind):
            lines.append(f"cat > {title[1]} <<'END OF FILE'\n{text}END OF FILE")
    return "\n".join(lines)


def test_what_is_made_of_a_page():
    page = (
        "a\n<!-- in the test: x=1 -->\n```bash\njaxdistill a\n```\n<!-- only parsed -->\n```bash\njaxdistill b\n```\n"
        '```python title="r.py"\ny = 2\n```\n```\nno command\n```\n'
    )
    assert script(page).split("\n") == [
        *("set -euo pipefail", "x=1", "unset ONLY_PARSED", "jaxdistill a", ""),
        *("export ONLY_PARSED=yes", "jaxdistill b", "", "cat > r.py <<'END OF FILE'", "y = 2", "END OF FILE"),
    ]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_no_command_hides_in_a_block_of_another_kind(page: Path):
    for found in _BLOCK.finditer(page.read_text(encoding="utf-8")):
        if found["kind"] is not None and found["kind"] != "bash":
            first = {line.split()[0] for line in found["text"].splitlines() if line.strip()}
            assert not first & {"jaxdistill", ".venv/bin/jaxdistill", *_PROGRAMS}, found[0]


@pytest.fixture(scope="module")
def teacher() -> Iterator[str]:
    """The options that name a teacher which is sometimes wrong."""
    with running_teacher(TeacherOptions(faults=Faults(wrong=0.1))) as url:
        yield f"--teacher.base-url {url} --teacher.model local-teacher --teacher.profile local"


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What readers of a page bring: problems, the model's tests, and a model, which is tiny and knows nothing."""
    folder = tmp_path_factory.mktemp("material")
    pool = problems.generate("all", 24, 0, "train")
    records.write_jsonl(folder / "pool.jsonl", pool)
    records.write_jsonl(folder / "test.jsonl", problems.generate("all", 3, 0, "heldout"))
    texts = [text for p in pool for text in (p.problem, p.solution or "")]
    student.write(folder / "model", texts, seed=0, num_hidden_layers=1, max_position_embeddings=512)
    for name in ("Qwen2.5-1.5B-Instruct", "Qwen2.5-Math-72B"):
        (folder / name).symlink_to(folder / "model")
    for name in ("configs", "launch"):
        (folder / name).symlink_to(ROOT / name)
    return folder


@pytest.fixture
def programs(tmp_path: Path) -> Path:
    """A folder with the command, which also only writes down its words, and with others that do nothing else."""
    folder = tmp_path / "programs"
    folder.mkdir()
    note = f'{{ printf "%s\\0" "${{0##*/}}" "$@"; printf "\\n\\0"; }} >> {tmp_path}'
    run = f'if [ -n "${{ONLY_PARSED:-}}" ]; then {note}/parsed; else exec {sys.executable} -m jaxdistill "$@"; fi'
    for name in ("jaxdistill", *_PROGRAMS):
        (folder / name).write_text(f"#!/bin/bash\n{run if name == 'jaxdistill' else f'{note}/others'}\n")
        (folder / name).chmod(stat.S_IRWXU)
    return folder


def noted(path: Path) -> list[list[str]]:
    """The commands that were written down, by their words."""
    lines = path.read_text().removesuffix("\n\0").split("\n\0") if path.exists() else []
    return [line.removesuffix("\0").split("\0") for line in lines]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_commands_of_a_page_run(
    page: Path, teacher: str, material: Path, programs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    folder = tmp_path / "home"
    folder.mkdir()
    for path in material.iterdir():
        (folder / path.name).symlink_to(path)
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS" and not k.endswith("_API_KEY")}
    environment |= {"PATH": f"{programs}:{os.environ['PATH']}", "TEACHER": teacher, "JAX_PLATFORMS": "cpu"}
    text = script(page.read_text(encoding="utf-8"))
    command = ["bash", "-c", text]
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300, stdin=subprocess.DEVNULL
    )
    assert done.returncode == 0, f"{done.stdout[-2000:]}\n{done.stderr[-3000:]}"

    parsed = [words for _, *words in noted(tmp_path / "parsed")]
    assert len(parsed) == PARSED.get(page.name, 0), f"commands that are only parsed: {parsed}"
    monkeypatch.chdir(folder)
    for words in parsed:
        name = next(name for name in (" ".join(words[:2]), words[0]) if name in cli.COMMANDS)
        try:
            cli.load(cli.COMMANDS[name], words[len(name.split()) :], name)
        except (SystemExit, UserError) as error:
            pytest.fail(f"jaxdistill {' '.join(words)}: {error}")
    assert {" ".join(words[:4]) for words in noted(tmp_path / "others")} == OTHERS.get(page.name, set())


def test_the_site_builds_strictly():
    if not SITE_PACKAGES.is_dir():
        pytest.skip(f"{SITE_PACKAGES} is absent; `make test` installs there what makes the site")
    environment = {**os.environ, "PYTHONPATH": f"{SITE_PACKAGES}:{os.environ.get('PYTHONPATH', ROOT)}"}
    command = [sys.executable, str(ROOT / "docs" / "make_site.py")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    pages = list((ROOT / "build" / "docs").rglob("*.html"))
    assert len(pages) > len(PAGES)
    for page in pages:
        loaded = re.findall(r"<(?:script|link|img)[^>]*(?:src|href)=[\"']?((?:https?:)?//[^\"' >]+)", page.read_text())
        assert not loaded, f"{page} loads from elsewhere: {loaded}"
