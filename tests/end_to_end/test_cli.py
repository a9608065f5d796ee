"""What a user sees who makes a mistake: one message that says what to do, exit code 2, and no traceback."""

from pathlib import Path

import pytest
from test_demo import jaxdistill

RECIPE = """
from pathlib import Path
from jaxdistill.train import Phase, TrainConfig

def config():
    phases = (Phase(name="a", examples=Path("none")),)
    return TrainConfig(workdir=Path({workdir!r}), model=Path("nowhere"), phases=phases)
"""


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "recipe.py"
    path.write_text(RECIPE.format(workdir=str(tmp_path / "run")))
    return path


def check(*words: str, expected: tuple[str, ...]) -> None:
    done = jaxdistill(*words)
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    for part in expected:
        assert part in done.stderr


def test_unknown_command() -> None:
    check("tarin", expected=("no command 'tarin'", "train"))


def test_missing_recipe() -> None:
    check("train", "nowhere.py", expected=("nowhere.py", "no such recipe"))


def test_recipe_of_another_command(recipe: Path) -> None:
    check("export", str(recipe), expected=("TrainConfig", "ExportConfig"))


def test_missing_model(recipe: Path) -> None:
    check("train", str(recipe), expected=("nowhere/config.json not found", "Hugging Face"))


def test_mesh_that_does_not_fit_the_devices(recipe: Path) -> None:
    check("train", str(recipe), "--mesh.fsdp", "3", "--batch-rows", "6", expected=("needs 3 devices, found 1",))


def test_unknown_field(recipe: Path) -> None:
    check("train", str(recipe), "--batch-row", "6", expected=("batch-row",))


def test_help_lists_fields_with_their_units() -> None:
    done = jaxdistill("train", "--help")
    assert done.returncode == 0
    assert "steps between checkpoints" in " ".join(done.stdout.split())


def test_help_lists_the_commands() -> None:
    done = jaxdistill("--help")
    assert done.returncode == 0
    for command in ("demo", "collect", "train", "sample", "evaluate", "export"):
        assert command in done.stdout
