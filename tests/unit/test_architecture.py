"""The layers of the package, what may import jax, how long a file may be, and what no committed file may contain."""

import ast
import graphlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "jaxdistill"

# Left to right; a module imports its own layer and those to its left. Two chains share their first modules.
TEXT = (
    (
        "errors",
        "sources",
        "parquet",
        "array_records",
        "records",
        "reading",
        "manifest",
        "progress",
        "html",
        "plots",
        "thinking",
        "verify",
    ),
    ("lineage",),
    ("transparency",),
    ("local_teacher",),
    ("collect",),
    ("curate",),
)
ARRAYS = (
    ("errors", "sources", "parquet", "array_records", "records", "manifest", "progress", "html", "plots", "thinking"),
    ("chips", "sharding", "tracking", "metrics", "rounding", "runtime", "weights", "integrity"),
    ("compiler", "models", "loss", "optim", "optim_state", "data"),
    ("publish",),
    (
        "hf_tensors",
        "hf",
        "lora",
        "checkpoint_damage",
        "checkpoint_retention",
        "checkpoint_store",
        "checkpoint",
        "checkpoint_tensors",
        "import_model",
    ),
    ("sample",),
    ("serve", "export", "export_check"),
    ("evaluate",),
    ("train",),
    ("plan", "doctor"),
    ("report", "launch"),
    ("demo",),
    ("sweep",),
    ("cli",),
)
TEXT_MODULES = frozenset(module for layer in TEXT for module in layer)
EXTRA = {
    "evaluate": frozenset({"collect", "verify"}),
    "doctor": TEXT_MODULES,
    "report": frozenset({"lineage", "transparency"}),
    "demo": TEXT_MODULES,
    "cli": TEXT_MODULES,
}
NEEDS_ACCELERATOR = frozenset({"jax", "jaxlib", "flax", "optax", "orbax", "grain"})  # each imports jax

BUDGET_LINES, LIMIT_LINES = 300, 400


def _allowed() -> dict[str, frozenset[str]]:
    """Top-level modules that each may import; one that is in both chains may import what both allow."""
    allowed: dict[str, frozenset[str]] = {}
    for chain in (TEXT, ARRAYS):
        left: frozenset[str] = frozenset()
        for layer in chain:
            left |= frozenset(layer)
            for module in layer:
                allowed[module] = allowed.get(module, left) & left
    return {module: names | EXTRA.get(module, frozenset()) for module, names in allowed.items()}


ALLOWED = _allowed()
FILES = sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")


def _top(path: Path) -> str:
    """The module or package directly under jaxdistill/ that a file belongs to."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported(source: str, path: Path, package: Path = PACKAGE) -> list[tuple[int, str]]:
    """(line, absolute dotted name) of every import in a file, under TYPE_CHECKING and inside functions too."""
    found = []
    folder = [package.name, *path.relative_to(package).parts[:-1]]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = folder[: len(folder) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            found += [(node.lineno, f"{module}.{alias.name}") for alias in node.names]
    return found


def _imports_of_package(path: Path) -> list[tuple[int, str]]:
    """(line, top-level module of jaxdistill) of a file's imports from the package itself."""
    names = [(line, name.split(".")) for line, name in imported(path.read_text(encoding="utf-8"), path)]
    return [(line, parts[1]) for line, parts in names if parts[0] == PACKAGE.name and len(parts) > 1]


def test_imported_finds_every_kind_of_import():
    source = """
import jaxdistill.loss
from typing import TYPE_CHECKING
if TYPE_CHECKING:
    from jaxdistill.train.run import Step
def late():
    from . import engine
    from ..models import qwen3
    from jaxdistill import hf
"""
    names = [name for _, name in imported(source, PACKAGE / "sample" / "server.py")]
    assert names == [
        "jaxdistill.loss",
        "typing.TYPE_CHECKING",
        "jaxdistill.train.run.Step",
        "jaxdistill.sample.engine",
        "jaxdistill.models.qwen3",
        "jaxdistill.hf",
    ]


def test_the_table_keeps_text_modules_apart_from_arrays():
    first = {"errors", "sources", "parquet", "array_records", "records", "manifest", "progress", "html", "plots"}
    first |= {"thinking"}
    assert ALLOWED["records"] == first
    assert ALLOWED["curate"] == TEXT_MODULES
    assert "collect" in ALLOWED["evaluate"]
    assert "collect" not in ALLOWED["train"]
    assert "curate" in ALLOWED["cli"]


def test_every_module_has_a_layer():
    unknown = sorted({_top(path) for path in FILES} - ALLOWED.keys() - {"__main__"})
    assert not unknown, (
        f"{unknown} of jaxdistill/ are in no layer: add each to TEXT or ARRAYS in tests/unit/test_architecture.py, "
        f"as far left as its imports allow"
    )


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_left(path: Path):
    allowed = ALLOWED.get(_top(path), ALLOWED["cli"])
    modules = ALLOWED.keys()
    wrong = [f"line {line}: {name}" for line, name in _imports_of_package(path) if name in modules - allowed]
    assert not wrong, (
        f"jaxdistill/{path.relative_to(PACKAGE)} imports from layers to its right: {wrong}; it may import "
        f"{sorted(allowed)} (TEXT and ARRAYS in tests/unit/test_architecture.py)"
    )


def test_modules_do_not_import_each_other_in_a_circle():
    graph = {_top(path): set() for path in FILES}
    for path in FILES:
        graph[_top(path)] |= {name for _, name in _imports_of_package(path) if name in graph and name != _top(path)}
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        pytest.fail(f"modules of one layer import each other in a circle: {' -> '.join(error.args[1])}")


@pytest.mark.parametrize(
    "path", [p for p in FILES if _top(p) in TEXT_MODULES], ids=lambda p: str(p.relative_to(PACKAGE))
)
def test_text_modules_name_nothing_that_needs_an_accelerator(path: Path):
    found = imported(path.read_text(encoding="utf-8"), path)
    wrong = [f"line {line}: {name}" for line, name in found if name.split(".")[0] in NEEDS_ACCELERATOR]
    assert not wrong, f"jaxdistill/{path.relative_to(PACKAGE)} must run without jax, but imports {wrong}"


def test_importing_text_modules_leaves_jax_out():
    modules = [
        ".".join(("jaxdistill", *path.relative_to(PACKAGE).with_suffix("").parts)).removesuffix(".__init__")
        for path in FILES
        if _top(path) in TEXT_MODULES and path.name != "__main__.py"
    ]
    program = f"""
import importlib, sys
for name in {modules}:
    importlib.import_module(name)
    if "jax" in sys.modules:
        sys.exit(f"importing {{name}} imports jax")
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_files_stay_short():
    lengths = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in FILES}
    long = {str(path.relative_to(PACKAGE)): lines for path, lines in lengths.items() if lines > BUDGET_LINES}
    assert max(long.values(), default=0) <= LIMIT_LINES, (
        f"split what is over {LIMIT_LINES} lines; files over the budget of {BUDGET_LINES}: {long}"
    )


# Written in pieces, so that this file does not contain what it looks for.
FORBIDDEN = {
    "a package registry's host": ("pypi" + ".org", "files.python" + "hosted", "registry." + "npmjs"),
    "a path of one machine": ("/" + "work/", "/" + "root/"),
}


def _files_in_git() -> list[Path]:
    """Tracked files, and new ones that git does not ignore: what the next commit could hold."""
    listing = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    done = subprocess.run(listing, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"not a git checkout: {done.stderr.strip()}")
    return [path for name in done.stdout.split("\0") if name and (path := ROOT / name).is_file()]


def test_no_committed_file_names_a_registry_or_this_machine():
    # A path counts where it starts: not in ../x/work/ or https://host/work/.
    words = [
        re.escape(word) if word[0] != "/" else rf"(?<![\w.~*)}}-]){word}"
        for group in FORBIDDEN.values()
        for word in group
    ]
    pattern = re.compile("|".join(words).encode())
    wrong = []
    for path in _files_in_git():
        for number, line in enumerate(path.read_bytes().split(b"\n"), start=1):
            if match := pattern.search(line):
                wrong.append(f"{path.relative_to(ROOT)}:{number}: {match.group().decode()}")
    assert not wrong, f"found {' or '.join(FORBIDDEN)}: {wrong}; use a relative path or a setting"
