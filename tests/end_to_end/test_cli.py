"""What a user sees who makes a mistake: one message that says what to do, exit code 2, and no traceback."""

import errno
from pathlib import Path
from typing import NoReturn

import pytest
import rows
from test_demo import jaxdistill

from jaxdistill import cli, manifest
from jaxdistill.curate import examples
from jaxdistill.curate.run import CurateConfig
from jaxdistill.errors import UserError
from jaxdistill.records import write_jsonl
from jaxdistill.train.config import TrainConfig

RECIPE = """
from pathlib import Path
from jaxdistill.train.config import Phase, TrainConfig

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


def test_a_command_with_methods_wants_one() -> None:
    check("refine", "--count", "3", expected=("no command 'refine'", "refine reformat", "refine mix"))
    check("refine", "selct", expected=("no command 'refine selct'", "refine select"))
    asked = jaxdistill("refine", "--help")
    assert asked.returncode == 0
    assert "refine translate" in asked.stdout
    assert "train" not in asked.stdout
    check("refine", "select", "--examples", "none", "--workdir", "w", "--count", "0", expected=("count is 0",))


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


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("def config(:\n", ":1: the recipe fails with SyntaxError: "),
        ("x = 1\nimport no_such_module\n", ":2: the recipe fails with ModuleNotFoundError: No module named"),
        ("def config():\n    return [0][1]\n", ":2: the recipe fails with IndexError: list index out of range"),
    ],
    ids=["syntax", "import", "config"],
)
def test_broken_recipe(text: str, expected: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "recipe.py"
    path.write_text(text)
    assert fails(capsys, "examples", str(path)).startswith(f"error: {path}{expected}")


def test_recipe_with_a_wrong_value_says_what_the_configuration_says(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "recipe.py"
    path.write_text(
        "from jaxdistill.collect.teacher import TeacherConfig\nconfig = lambda: TeacherConfig(in_flight=0)\n"
    )
    assert fails(capsys, "collect", str(path)) == "error: teacher.in_flight is 0, expected at least 1\n"


def test_a_broken_recipe_and_a_file_in_the_way_in_a_process_of_their_own(tmp_path: Path) -> None:
    (tmp_path / "recipe.py").write_text("def config():\n    raise KeyError('x')\n")
    check("examples", str(tmp_path / "recipe.py"), expected=("recipe.py:2: the recipe fails with KeyError: 'x'",))
    words = small_run(tmp_path)
    (tmp_path / "run").write_text("a file")
    check(*words, expected=(f"{tmp_path / 'run'}: there is a file where a folder is needed",))


def small_run(folder: Path) -> list[str]:
    """The words of a command that works in folder/run, without jax."""
    chain = rows.chain(messages=({"role": "assistant", "content": "4"},))
    write_jsonl(folder / "chains.jsonl", [chain])
    return ["examples", "--chains", str(folder / "chains.jsonl"), "--workdir", str(folder / "run")]


def fails(capsys: pytest.CaptureFixture[str], *words: str, code: int = 2) -> str:
    """The message of a command that must fail, run in this process."""
    with pytest.raises(SystemExit) as caught:
        cli.main(list(words))
    assert caught.value.code == code
    return capsys.readouterr().err


def test_folders_and_files_in_the_way(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = small_run(tmp_path)
    (tmp_path / "run").write_text("a file")
    words[-1] = str(tmp_path / "run" / "deeper")
    assert f"{words[-1]}: a part of this path is a file" in fails(capsys, *words)
    partial = tmp_path / "other" / "examples.jsonl.partial"
    partial.mkdir(parents=True)
    words[-1] = str(partial.parent)
    assert f"{partial}: there is a folder where a file is needed" in fails(capsys, *words)
    words[-1] = "/proc/none/run"
    assert "/proc/none: no folder can be made here; choose another workdir" in fails(capsys, *words)
    words[-1] = str(tmp_path / ("long" * 100))
    assert "the name is too long for this file system" in fails(capsys, *words)


@pytest.mark.parametrize(
    ("error", "code", "expected"),
    [
        (PermissionError(errno.EACCES, "no", "/there"), 2, "error: /there: permission denied"),
        (OSError(errno.EROFS, "no", "/there"), 2, "error: /there: read-only file system; choose another workdir"),
        (OSError(errno.EROFS, "no"), 2, "error: {workdir}: read-only file system; choose another workdir"),
        (OSError(errno.ENOSPC, "full"), 1, "error: the disk is full: free space at {workdir} and run the same command"),
        (OSError(errno.ENOSPC, "full", "/there"), 1, "error: the disk is full: free space at /there and run"),
    ],
    ids=["permission", "read-only", "read-only-without-path", "full", "full-with-path"],
)
def test_errors_of_the_disk(
    error: OSError,
    code: int,
    expected: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(_: object) -> NoReturn:
        raise error

    monkeypatch.setattr(examples, "main", fail)
    message = fails(capsys, *small_run(tmp_path), code=code)
    assert message.startswith(expected.format(workdir=tmp_path / "run"))


@pytest.mark.parametrize("error", [OSError(errno.EIO, "broken"), ConnectionResetError(), KeyError("bug")], ids=repr)
def test_other_errors_keep_their_traceback(error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: object) -> NoReturn:
        raise error

    monkeypatch.setattr(examples, "main", fail)
    with pytest.raises(type(error)) as caught:
        cli.main(small_run(tmp_path))
    assert caught.value is error


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (["--a", "1", "--b=2"], ["--a", "1", "--b=2"]),
        (["r.py", "--m", "x", "--s", "-1", "--m", "y"], ["r.py", "--m", "x", "y", "--s", "-1"]),
        (["--m=x", "--m=y", "--quick"], ["--m", "x", "y", "--quick"]),
    ],
)
def test_an_option_that_is_given_again_gives_more_values(given: list[str], expected: list[str]) -> None:
    assert cli.together(given, None) == expected


def test_one_value_given_twice_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    again = ["--workdir", str(tmp_path / "other")]
    for words in (again, [f"{again[0]}={again[1]}"]):
        with pytest.raises(SystemExit) as ended:
            cli.main([*small_run(tmp_path), *words])
        assert ended.value.code == 2
        assert f"{tmp_path / 'other'}; it takes one value: leave one" in capsys.readouterr().err
    for name in ("--mesh.fsdp", "--phases.0.examples"):
        with pytest.raises(UserError, match=rf"{name} is given 3 times, 1 and 2 and 3"):
            cli.together([f"{name}=1", name, "2", name, "3"], TrainConfig)
    assert cli.together(["--report", "--inputs", "a", "--report", "--inputs=b"], CurateConfig) == [
        *("--report", "--inputs", "a", "b")
    ]


def test_data_in_the_place_of_a_recipe(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "problems.jsonl").write_text('{"id": "a"}\n')  # which is Python, too
    said = fails(capsys, "collect", str(tmp_path / "problems.jsonl"))
    assert "problems.jsonl: no recipe; expected a .py file" in said
    assert "or options alone: `jaxdistill collect --help` lists them" in said


@pytest.mark.parametrize("message", [r"a \[b] [/] [bold]x[/bold] \\[B, T] :smile:", "[", r"ends in \ "])
def test_messages_are_printed_as_they_are(message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli._fail(message, 2)
    assert capsys.readouterr().err == f"error: {message}\n"


def test_an_empty_file_of_chains_and_lost_requests(tmp_path: Path) -> None:
    (tmp_path / "chains.jsonl").touch()
    words = ("--chains", str(tmp_path / "chains.jsonl"), "--workdir", str(tmp_path / "run"))
    check("examples", *words, expected=("chains.jsonl: holds no chain",))
    (tmp_path / "problems.jsonl").write_text('{"id": "a", "problem": "1 + 1?", "answer": "2"}\n')
    words = ("--problems", str(tmp_path / "problems.jsonl"), "--workdir", str(tmp_path / "run"))
    teacher = ("--teacher.base-url", "http://127.0.0.1:9/v1", "--teacher.attempt-limit", "1")
    done = jaxdistill("collect", *words, *teacher)
    assert done.returncode == 1, done.stderr
    assert "Traceback" not in done.stderr
    assert "collect: 0 verified, 0 wrong, 0 truncated, 1 failed" in done.stderr
    assert "1 of 1 requests have no answer yet, most often because of: no connection" in done.stderr


def test_help_lists_fields_with_their_units() -> None:
    done = jaxdistill("train", "--help")
    assert done.returncode == 0
    assert "steps between checkpoints" in " ".join(done.stdout.split())


def test_help_lists_the_commands() -> None:
    done = jaxdistill("--help")
    assert done.returncode == 0
    for command in ("demo", "collect", "train", "sample", "evaluate", "export"):
        assert command in done.stdout


def test_two_processes_do_not_share_a_run_folder(recipe: Path, tmp_path: Path) -> None:
    with manifest.held(tmp_path / "run"):
        check("train", str(recipe), expected=("in use by another process",))
    assert not (tmp_path / "run").exists()
