"""An extension of Griffe: the docstrings' plain text as Markdown."""

import re
from typing import Any

import griffe


class Prose(griffe.Extension):
    """Marks examples as code and formulas as literal text, so that `*` and `_` in them are no markup."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring:
            obj.docstring.value = prose(obj.docstring.value)


def prose(text: str) -> str:
    """A docstring whose first line, if a formula, is code, and whose example is a section that Griffe knows."""
    text = re.sub(r"^Example:", "Examples:", text, flags=re.MULTILINE)
    first, *rest = text.split("\n\n", 1)
    if re.match(r"[^.`]* = ", first) or re.match(r"\S*\(", first):
        first = "`" + re.sub(r"\s+", " ", first.replace("`", "")) + "`"
    return "\n\n".join([first, *rest])
