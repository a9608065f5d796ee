"""The pinned files say what pyproject.toml asks for, on every supported Python, and never choose a build of torch."""

import re
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
ASKED = {
    "base": PROJECT["dependencies"],
    "dev": [*PROJECT["dependencies"], *PROJECT["optional-dependencies"]["dev"]],
}


def pins(name: str) -> list[Requirement]:
    """The `package==version ; marker` lines of a pinned file, without their hashes."""
    lines = (ROOT / "requirements" / f"{name}.txt").read_text(encoding="utf-8").splitlines()
    return [Requirement(line.removesuffix("\\").strip()) for line in lines if re.match(r"[a-z0-9]", line)]


def pinned_versions(name: str, python: str) -> dict[str, str]:
    """Version by package on Linux, x86_64 and the given Python."""
    environment = {
        "python_version": python,
        "python_full_version": f"{python}.0",
        "sys_platform": "linux",
        "platform_machine": "x86_64",
        "platform_system": "Linux",
    }
    chosen = [pin for pin in pins(name) if pin.marker is None or pin.marker.evaluate(environment)]
    versions = {str(canonicalize_name(pin.name)): str(pin.specifier).removeprefix("==") for pin in chosen}
    assert len(versions) == len(chosen), f"requirements/{name}.txt pins a package twice on Python {python}"
    return versions


@pytest.mark.parametrize("python", ["3.11", "3.12", "3.13", "3.14"])
@pytest.mark.parametrize("name", ASKED)
def test_what_pyproject_asks_for_is_pinned(name: str, python: str):
    versions = pinned_versions(name, python)
    asked = [Requirement(line) for line in ASKED[name]]
    stale = [str(r) for r in asked if not r.specifier.contains(versions.get(canonicalize_name(r.name), "0"))]
    assert not stale, f"requirements/{name}.txt does not satisfy {stale}: run `make lock` and commit the result"


@pytest.mark.parametrize("python", ["3.11", "3.13"])
def test_development_adds_to_the_base_and_changes_nothing(python: str):
    assert pinned_versions("base", python).items() <= pinned_versions("dev", python).items()


def test_jax_follows_the_python():
    assert pinned_versions("base", "3.11")["jax"] == "0.10.2"
    assert pinned_versions("base", "3.12")["jax"] >= "0.11.2"


@pytest.mark.parametrize("name", ASKED)
def test_torch_and_cuda_are_left_to_a_step_of_their_own(name: str):
    names = {pin.name for pin in pins(name)}
    assert not [n for n in names if n in {"torch", "triton"} or n.startswith(("nvidia-", "cuda-"))]
