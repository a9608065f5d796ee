"""Prompts are versioned text files; this reads them and fills in their {names}."""

import hashlib
import re
from collections.abc import Mapping
from pathlib import Path

from jaxdistill.errors import UserError

COLLECT_PROMPTS = Path(__file__).parent / "prompts"


def read_prompt(name: str, folder: Path) -> str:
    """The text of `folder/name.txt`, without the last newline.

    Raises:
      UserError: no such prompt; names the ones there are.
    """
    path = folder / f"{name}.txt"
    if not path.is_file():
        raise UserError(
            f"prompt {name!r} is not in {folder}; expected one of {sorted(p.stem for p in folder.glob('*.txt'))}"
        )
    return path.read_text(encoding="utf-8").strip()


def prompt_id(name: str, text: str) -> str:
    """What records say about the prompt they were made with: name@hash, so that an edited file is another prompt."""
    return f"{name}@{hashlib.sha256(text.encode()).hexdigest()[:16]}" if name else ""


def fill(template: str, values: Mapping[str, str]) -> str:
    r"""Replaces each {name} of `values`; other braces (\boxed{}) and braces inside the values stay as they are."""
    names = "|".join(re.escape(name) for name in values)
    return re.sub(rf"\{{({names})\}}", lambda match: values[match[1]], template)
