"""The documentation site: the pages of this folder, what was measured, the commands and the modules.

    python docs/make_site.py

Needs Zensical and mkdocstrings, which `make docs` puts beside (requirements/docs.txt). Ends with an error where a link,
an anchor or a reference leads nowhere, and where a docstring names an argument that is not there.
"""

import contextlib
import io
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from jaxdistill import cli

ROOT = Path(__file__).parents[1]
BUILD = ROOT / "build"
PACKAGE = ROOT / "jaxdistill"
COLUMNS = 100  # of the commands' help


def main() -> None:
    """Writes the site's sources to build/docs_source, and the site to build/docs."""
    source = BUILD / "docs_source"
    shutil.rmtree(source, ignore_errors=True)
    results = [(path.stem, path.read_text(encoding="utf-8")) for path in (ROOT / "benchmarks/results").glob("*.md")]
    pages = {f"results/{name}.md": text for name, text in sorted(results)}
    measured = list(pages)
    pages |= {path.name: path.read_text(encoding="utf-8") for path in (ROOT / "docs").glob("*.md")}
    pages |= {"reference/commands.md": commands(), **dict(modules())}
    for name, text in pages.items():
        path = source / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text.replace("](../benchmarks/results/", "](results/"), encoding="utf-8")
    for picture in (ROOT / "docs").glob("*.svg"):
        shutil.copy(picture, source)
    site: dict[str, Any] = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))
    site |= {"docs_dir": "docs_source", "site_dir": "docs"}  # Zensical wants them relative to its file
    [mkdocstrings] = [plugin["mkdocstrings"] for plugin in site["plugins"] if "mkdocstrings" in plugin]
    python_handler = mkdocstrings["handlers"]["python"]
    python_handler["paths"] = [str(ROOT)]
    python_handler["options"]["extensions"] = [str(ROOT / "docs" / "field_comments.py")]
    python = [name for name in pages if name.startswith("reference/python/")]
    site["nav"] += [{"Results": measured}, {"Reference": [{"Commands": "reference/commands.md"}, {"Python": python}]}]
    config = BUILD / "mkdocs.yml"
    config.write_text(yaml.safe_dump(site, sort_keys=False), encoding="utf-8")
    command = [sys.executable, "-m", "zensical", "build", "--strict", "--clean", "--config-file", str(config)]
    environment = {**os.environ, "NO_COLOR": "1"}
    done = subprocess.run(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
    )
    print(done.stdout, end="")
    said = [line for line in done.stdout.splitlines() if line.startswith("griffe:")]  # --strict lets these pass
    sys.exit(done.returncode or bool(said))


def commands() -> str:
    """A page with the help of every command, by its own parser."""
    os.environ |= {"COLUMNS": str(COLUMNS), "NO_COLOR": "1"}
    found = ["# Commands", "What `jaxdistill COMMAND --help` says, of every command."]
    for name in cli.COMMANDS:
        text = io.StringIO()
        with contextlib.redirect_stdout(text), contextlib.suppress(SystemExit):
            cli.main([*name.split(), "--help"])
        found.append(f"## {name}\n\n```text\n{text.getvalue().rstrip()}\n```")
    return "\n\n".join(found) + "\n"


def modules() -> Iterator[tuple[str, str]]:
    """A page for each module or package right under jaxdistill/, with its own modules on it."""
    for top in sorted(path for path in PACKAGE.iterdir() if path.suffix == ".py" or (path / "__init__.py").is_file()):
        if top.stem.startswith("_"):
            continue
        files = [top] if top.is_file() else sorted(top.rglob("*.py"))
        parts = [path.relative_to(ROOT).with_suffix("").parts for path in files]
        names = [".".join(part for part in name if part != "__init__") for name in parts]
        text = "\n\n".join([f"# {top.stem}", *(f"::: {name}" for name in names)])
        yield f"reference/python/{top.stem}.md", text + "\n"


if __name__ == "__main__":
    main()
