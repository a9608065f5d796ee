"""`jaxdistill COMMAND [RECIPE.py] [--field.sub value ...]`: the commands, and how a recipe becomes a config."""

import importlib
import runpy
import sys
from pathlib import Path
from typing import Any, NamedTuple

import tyro
from rich.console import Console

from jaxdistill.errors import RunError, UserError


class Command(NamedTuple):
    """A command runs `main(config)` of a module, which is imported only when it is asked for."""

    module: str
    config: str  # the dataclass of that module that the command takes
    summary: str
    uses_devices: bool = True


COMMANDS = {
    "demo": Command("jaxdistill.demo.run", "DemoConfig", "the whole chain on this machine, offline, with a report"),
    "collect": Command("jaxdistill.collect.run", "CollectConfig", "problems -> verified chains", False),
    "reformat": Command("jaxdistill.curate.reformat", "ReformatConfig", "solutions -> reformatted examples", False),
    "examples": Command("jaxdistill.curate.examples", "ExamplesConfig", "chains -> examples to train on", False),
    "train": Command("jaxdistill.train", "TrainConfig", "Hugging Face folder + examples -> checkpoints"),
    "sample": Command("jaxdistill.sample.run", "SampleConfig", "checkpoint or Hugging Face folder -> text"),
    "evaluate": Command("jaxdistill.evaluate.run", "EvaluateConfig", "model + task -> scores with intervals"),
    "export": Command("jaxdistill.export", "ExportConfig", "checkpoint -> verified Hugging Face folder"),
}

_USAGE = """usage: jaxdistill COMMAND [RECIPE.py] [--field value ...]

RECIPE.py defines config(), which returns the command's configuration; fields given on the command line win.
`jaxdistill COMMAND --help` lists every field with its unit and default.

"""


def load(command: Command, arguments: list[str], name: str) -> Any:
    """The configuration that a recipe and the overrides after it describe.

    Raises:
      UserError: there is no such recipe, or it does not return this command's configuration.
    """
    kind = getattr(importlib.import_module(command.module), command.config)
    program = f"jaxdistill {name}"
    if not arguments or arguments[0].startswith("-"):
        return tyro.cli(kind, args=arguments, prog=program)
    path, *overrides = arguments
    if not Path(path).is_file():
        raise UserError(f"{path}: no such recipe; expected a .py file with a function config(), as in configs/")
    make = runpy.run_path(path).get("config")
    default = make() if callable(make) else None
    if not isinstance(default, kind):
        raise UserError(
            f"{path}: config() gives {type(default).__name__}, but `{program}` takes {command.config}; "
            "is it the recipe of another command?"
        )
    flags = (tyro.conf.AvoidSubcommands,)
    return tyro.cli(kind, default=default, args=overrides, prog=f"{program} {path}", config=flags)


def main(arguments: list[str] | None = None) -> None:
    """Runs a command. Exit codes: 0 done, 1 failed, 2 the user's mistake."""
    name, *rest = (sys.argv[1:] if arguments is None else arguments) or ["--help"]
    if name in ("-h", "--help"):
        print(_USAGE + "\n".join(f"  {name:10} {command.summary}" for name, command in COMMANDS.items()))
        return
    try:
        if name not in COMMANDS:
            raise UserError(f"no command {name!r}; expected one of {', '.join(COMMANDS)}")
        command = COMMANDS[name]
        config = load(command, rest, name)
        if command.uses_devices:
            from jaxdistill import runtime  # imports jax, which the other commands do without

            runtime.start()
        importlib.import_module(command.module).main(config)
    except UserError as error:
        _fail(f"{error}", 2)
    except RunError as error:
        _fail(f"{error}", 1)
    except KeyboardInterrupt:
        _fail("interrupted; run the same command again to go on", 1)


def _fail(message: str, code: int) -> None:
    Console(stderr=True, highlight=False, soft_wrap=True).print(f"[bold red]error:[/bold red] {_plain(message)}")
    raise SystemExit(code)


def _plain(message: str) -> str:
    return message.replace("[", "\\[")  # rich would take [B, T] for a style
