"""HTML pages from jinja templates: text is escaped, an unknown name is an error, and a page is written whole."""

from pathlib import Path
from typing import Any

import jinja2

from jaxdistill.records import whole_file


def write(path: Path, template: Path, **values: Any) -> None:
    """Fills in a template, which may include others of its folder and style.css.jinja; the file appears whole."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader([template.parent, Path(__file__).parent]),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    page = environment.get_template(template.name).render(values)
    with whole_file(path) as file:
        # A model may write half an emoji, which UTF-8 cannot hold: it becomes a reference that browsers show as U+FFFD
        file.write(page.encode(errors="xmlcharrefreplace").decode())
