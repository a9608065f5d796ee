"""Problems from the Hugging Face hub, through `datasets`: written to a file once, and read from there like any."""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, cast

from jaxdistill.errors import UserError
from jaxdistill.records import write_jsonl


def fetch(name: str, path: Path) -> None:
    """Writes the rows of OWNER/NAME[/CONFIG]:SPLIT, or of a folder:SPLIT, as JSON Lines, unless the file is there.

    A row without an `id` gets its number as one.

    Raises:
      UserError: the name is none, `datasets` is not installed, or it cannot load the set.
    """
    found = re.fullmatch(r"(.+):([\w\[\]%:.+-]+)", name)
    if not found:
        raise UserError(f"hub is {name!r}; expected OWNER/NAME:SPLIT, OWNER/NAME/CONFIG:SPLIT or a folder:SPLIT")
    if path.is_file():
        return
    try:
        import datasets  # type: ignore[import-not-found]
    except ImportError:
        raise UserError(
            f"{name} needs the package datasets, which is not installed; pip install 'jaxdistill[hub]', or download "
            "the file yourself and give it as --path"
        ) from None
    place, split = found[1], found[2]
    arguments = [place] if Path(place).is_dir() else ["/".join(place.split("/")[:2]), *place.split("/")[2:]]
    try:
        rows = cast("Iterable[Mapping[str, Any]]", datasets.load_dataset(*arguments, split=split))
    except Exception as error:  # of many kinds, from the network to the builder
        raise UserError(f"datasets cannot load {name}: {type(error).__name__}: {error}") from None
    write_jsonl(path, ({"id": f"{path.stem}-{number}", **row} for number, row in enumerate(rows)))
