"""Griffe reads the comment behind a field as its docstring, as the command line's help does."""

import io
import tokenize
from typing import Any

import griffe  # pyright: ignore[reportMissingImports]  (it is in .tools/docs)


class FieldComments(griffe.Extension):
    """Gives fields that have no docstring the comment at the end of their lines."""

    def on_attribute_instance(self, *, attr: griffe.Attribute, **_: Any) -> None:
        """Called for every attribute that griffe reads from a source."""
        if attr.docstring or not attr.parent or not attr.parent.is_class:
            return
        source = "\n".join(line.strip() for line in attr.lines)
        found = [t.string for t in tokenize.generate_tokens(io.StringIO(source).readline) if t.type == tokenize.COMMENT]
        if found:
            text = " ".join(comment.lstrip("# ") for comment in found)
            attr.docstring = griffe.Docstring(text, lineno=attr.lineno, parent=attr)
