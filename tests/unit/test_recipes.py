"""Every recipe of configs/ returns the configuration of a command, and says how it is run."""

import importlib
import runpy
from pathlib import Path

import pytest

from jaxdistill.cli import COMMANDS, load

RECIPES = sorted((Path(__file__).parents[2] / "configs").glob("*.py"))


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_recipe_gives_a_config_that_the_command_in_its_docstring_takes(recipe: Path) -> None:
    values = runpy.run_path(str(recipe))
    config = values["config"]()
    names = [
        name
        for name, command in COMMANDS.items()
        if type(config) is getattr(importlib.import_module(command.module), command.config)
    ]
    assert len(names) == 1
    assert f"jaxdistill {names[0]} configs/{recipe.name}" in values["__doc__"]
    assert load(COMMANDS[names[0]], [str(recipe)], names[0]) == config
