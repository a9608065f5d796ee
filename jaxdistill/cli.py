"""`jaxdistill COMMAND [RECIPE.py] [--field.sub value ...]`: the commands, and how a recipe becomes a config."""

import collections.abc
import contextlib
import dataclasses
import errno
import functools
import importlib
import os
import runpy
import sys
import time
import traceback
import types
import typing
from pathlib import Path
from typing import Any, NamedTuple, get_type_hints

import tyro
from rich.text import Text

from jaxdistill import manifest
from jaxdistill.errors import FAILED, MISTAKE, PREEMPTED, PreemptedError, RunError, StuckError, UserError
from jaxdistill.progress import say


class Command(NamedTuple):
    """A command runs a function of a module, which is imported only when it is asked for, with its configuration."""

    module: str
    config: str  # the dataclass of that module that the command takes
    summary: str
    uses_devices: bool = True
    recipe: str | None = ""  # the field that takes a recipe, or the whole configuration; None: it takes words instead
    writes: bool = True  # in a run folder, the config's workdir
    function: str = "main"
    words: bool = False  # the function is also given the words of its command line: it starts itself again
    joins: bool = False  # the other processes of its job: one command on many hosts


_tti = functools.partial(Command, "jaxdistill.report.tti", uses_devices=False, recipe=None, writes=False)

COMMANDS = {
    "demo": Command("jaxdistill.demo.run", "DemoConfig", "the whole chain on this machine, offline, with a report"),
    "curate": Command(
        "jaxdistill.curate.run", "CurateConfig", "problem pools -> curated problems, a reason for each dropped", False
    ),
    "collect": Command("jaxdistill.collect.run", "CollectConfig", "problems -> verified chains", False),
    "refine reformat": Command(
        "jaxdistill.curate.reformat", "ReformatConfig", "solutions -> rewritten examples", False
    ),
    "refine import": Command(
        "jaxdistill.curate.adopt", "ImportConfig", "long thoughts of any shape -> examples", False
    ),
    "refine select": Command("jaxdistill.curate.select", "SelectConfig", "examples -> those that reflect most", False),
    "refine translate": Command(
        "jaxdistill.curate.translate", "TranslateConfig", "examples -> Chinese examples", False
    ),
    "refine mix": Command("jaxdistill.curate.mix", "MixConfig", "sets of examples -> one, shuffled", False),
    "examples": Command("jaxdistill.curate.examples", "ExamplesConfig", "chains -> examples to train on", False),
    "train": Command(
        "jaxdistill.train.run", "TrainConfig", "Hugging Face folder + examples -> checkpoints", joins=True
    ),
    "plan": Command(
        "jaxdistill.plan.run", "PlanConfig", "recipe + hardware -> fit, speed, cost", False, recipe="train"
    ),
    "sample": Command("jaxdistill.sample.run", "SampleConfig", "checkpoint or Hugging Face folder -> text"),
    "chat": Command("jaxdistill.sample.chat", "ChatConfig", "talk to a model in this terminal", writes=False),
    "serve": Command("jaxdistill.serve.run", "ServeConfig", "a model behind OpenAI's API", writes=False),
    "evaluate": Command("jaxdistill.evaluate.run", "EvaluateConfig", "model + task -> scores with intervals"),
    "import": Command(
        "jaxdistill.import_model", "ImportConfig", "Hugging Face folder -> checkpoint, tensor by tensor", False
    ),
    "export": Command("jaxdistill.export", "ExportConfig", "checkpoint -> verified Hugging Face folder"),
    "doctor": Command(
        "jaxdistill.doctor", "DoctorConfig", "what works on this machine, or at --teacher's API", writes=False
    ),
    "report": Command(
        "jaxdistill.report.run", "ReportConfig", "run folders -> one page about them", False, recipe=None
    ),
    "sweep": Command(
        "jaxdistill.sweep.run", "SweepConfig", "a grid -> runs, one table", False, writes=False, words=True
    ),
    "fit": Command("jaxdistill.sweep.fit", "FitConfig", "a table -> a scaling law", False, recipe=None),
    "launch": Command("jaxdistill.launch.run", "LaunchConfig", "recipe + target -> the file that starts it", False),
    "tti score": _tti("ScoreConfig", "a work's answers -> transparency", function="score"),
    "tti run": _tti("RunConfig", "run folders -> their own score", function="run"),
    "tti leaderboard": _tti("LeaderboardConfig", "works, most transparent first", function="leaderboard"),
}

_HELP = ("-h", "--help")
_USAGE = """usage: jaxdistill COMMAND [RECIPE.py] [--field value ...]

RECIPE.py defines config(), which returns the command's configuration; fields given on the command line win.
`jaxdistill COMMAND --help` lists every field with its unit and default.

"""


def load(command: Command, arguments: list[str], name: str) -> Any:
    """The configuration that a recipe and the overrides after it describe.

    Raises:
      UserError: there is no such recipe, it fails, or it does not return this command's configuration.
    """
    kind = getattr(importlib.import_module(command.module), command.config)
    arguments = together(arguments, kind)
    program = f"jaxdistill {name}"
    if command.recipe is None:
        return tyro.cli(kind, args=arguments, prog=program, config=(tyro.conf.PositionalRequiredArgs,))
    if not arguments or arguments[0].startswith("-"):
        return tyro.cli(kind, args=arguments, prog=program)
    path, *overrides = arguments
    if not Path(path).is_file() or Path(path).suffix != ".py":
        found = "no recipe" if Path(path).exists() else "no such recipe"
        raise UserError(
            f"{path}: {found}; expected a .py file with a function config(), as in configs/, or options alone: "
            f"`{program} --help` lists them"
        )
    default = _run_recipe(path)
    wanted = get_type_hints(kind)[command.recipe] if command.recipe else kind
    if not isinstance(default, wanted):
        raise UserError(
            f"{path}: config() gives {type(default).__name__}, but `{program}` takes {wanted.__name__}; "
            "is it the recipe of another command?"
        )
    default = kind(**{command.recipe: default}) if command.recipe else default
    flags = (tyro.conf.AvoidSubcommands,)
    return tyro.cli(kind, default=default, args=overrides, prog=f"{program} {path}", config=flags)


def together(arguments: list[str], config: Any) -> list[str]:
    """An option that is given again gives more values: `--model A --model B` is `--model A B`.

    Raises:
      UserError: it takes one value; argparse would take the last alone without a word.
    """
    names = [argument.partition("=")[0] for argument in arguments if argument.startswith("--")]
    repeated = [name for name in dict.fromkeys(names) if names.count(name) > 1]
    if not repeated:
        return arguments
    first: list[str] = []
    options: dict[str, list[str]] = {}
    values = first
    for argument in arguments:
        if not argument.startswith("--"):
            values.append(argument)
            continue
        name, given, value = argument.partition("=")
        values = options.setdefault(name, [])
        values += [value] if given else []
    for name in repeated:
        if len(options[name]) > 1 and not _takes_many(config, name.removeprefix("--").split(".")):
            given = " and ".join(options[name])
            raise UserError(f"{name} is given {names.count(name)} times, {given}; it takes one value: leave one")
    return first + [word for name, values in options.items() for word in (name, *values)]


def _takes_many(kind: Any, path: list[str]) -> bool:
    """Whether an option, by its dotted path in a configuration, takes more than one value; unknown ones do."""
    origin, parts = typing.get_origin(kind), typing.get_args(kind)
    if origin in (types.UnionType, typing.Union):
        return any(_takes_many(part, path) for part in parts if part is not type(None))
    if origin in (tuple, list, collections.abc.Mapping):
        return not path or not path[0].isdigit() or _takes_many(parts[0], path[1:])
    if not path:
        return False
    if not dataclasses.is_dataclass(kind):
        return True
    hints = get_type_hints(kind)
    name = path[0].replace("-", "_")
    return name not in hints or _takes_many(hints[name], path[1:])


def _run_recipe(path: str) -> Any:
    """What config() of a recipe returns, None where it has none; its errors become one line that says where."""
    try:
        make = runpy.run_path(path).get("config")
        return make() if callable(make) else None
    except (UserError, RunError):
        raise
    except Exception as error:
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == path]
        what = str(error)
        if isinstance(error, SyntaxError) and error.filename == path:
            lines, what = [error.lineno], error.msg
        where = f"{path}:{lines[-1]}" if lines and lines[-1] else path
        raise UserError(f"{where}: the recipe fails with {type(error).__name__}: {what}; mend this line") from error


def main(arguments: list[str] | None = None) -> None:
    """Runs a command. Exit codes: 0 done, 1 failed, 2 the user's mistake, 75 preempted."""
    name, *rest = (sys.argv[1:] if arguments is None else arguments) or ["--help"]
    group = [command for command in COMMANDS if command.startswith(f"{name} ")]  # of two words
    if name in _HELP or (group and rest and rest[0] in _HELP):
        print(_USAGE + "\n".join(f"  {name:16} {COMMANDS[name].summary}" for name in group or COMMANDS))
        return
    config, leads, launched = None, True, time.time()
    try:
        if group and rest and not rest[0].startswith("-"):
            name, rest = f"{name} {rest[0]}", rest[1:]
        if name not in COMMANDS:
            raise UserError(f"no command {name!r}; expected one of {', '.join(group or COMMANDS)}")
        command = COMMANDS[name]
        config = load(command, rest, name)
        if command.uses_devices:
            from jaxdistill import runtime  # imports jax, which the other commands do without

            runtime.start(join=command.joins, launched=launched)
            leads = runtime.leads()
        with manifest.held(config.workdir) if command.writes and leads else contextlib.nullcontext():
            given = (config, rest) if command.words else (config,)
            getattr(importlib.import_module(command.module), command.function)(*given)
    except UserError as error:
        _fail(f"{error}", MISTAKE)
    except PreemptedError as error:
        _fail(f"{error}", PREEMPTED)
    except StuckError as error:
        _tell(f"{error}")
        os._exit(FAILED)  # Python's own way out waits for every thread
    except RunError as error:
        _fail(f"{error}", FAILED)
    except OSError as error:
        message, code = _explain(error, getattr(config, "workdir", None))
        if not message:
            raise
        _fail(message, code)
    except KeyboardInterrupt:
        _fail("interrupted; run the same command again to go on", FAILED)


def _fail(message: str, code: int) -> None:
    _tell(message)
    raise SystemExit(code)


def _tell(message: str) -> None:
    say(Text.assemble(("error:", "bold red"), " ", message))


def _explain(error: OSError, workdir: Path | None) -> tuple[str, int]:
    """Message and exit code for what users can mend in their file system; an empty message for all else."""
    place = error.filename or workdir or "the run folder"  # a failed write does not name its file
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return (
            f"the disk is full: free space at {place} and run the same command again; what was written is kept",
            FAILED,
        )
    if error.errno == errno.EROFS:
        return f"{place}: read-only file system; choose another workdir", MISTAKE
    remedies = {
        errno.EEXIST: "there is a file where a folder is needed; move it away or choose another workdir",
        errno.ENOTDIR: "a part of this path is a file, not a folder; move it away or choose another workdir",
        errno.EISDIR: "there is a folder where a file is needed; move it away or choose another path",
        errno.EACCES: "permission denied; give this user access to it or choose another path",
        errno.EPERM: "permission denied; give this user access to it or choose another path",
        errno.ENAMETOOLONG: "the name is too long for this file system; choose a shorter one",
        errno.ELOOP: "links that lead to each other; mend them or choose another path",
    }
    remedy = remedies.get(error.errno or 0)
    return (f"{error.filename}: {remedy}", MISTAKE) if remedy and error.filename else ("", FAILED)
