"""The pages of the documentation and the Python code in them."""

from __future__ import annotations

import importlib.util
import re
import sys
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

from attention_zoo import BLOCKS

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
CODE = re.compile(r"(<!-- slow -->\n)?^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)


class Code(NamedTuple):
    """A block of Python code: the page, the line of its start, its text, and whether it takes longer than a second."""

    page: str
    line: int
    text: str
    slow: bool


@cache
def generator() -> ModuleType:
    """docs/generate.py, which is no package."""
    spec = importlib.util.spec_from_file_location("docs_generate", DOCS / "generate.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@cache
def written_pages() -> dict[str, str]:
    """Every page that is not generated, by path relative to docs/; README.md is called so."""
    written = {path.relative_to(DOCS).as_posix(): path.read_text() for path in sorted(DOCS.rglob("*.md"))}
    return {"README.md": (ROOT / "README.md").read_text(), **written}


@cache
def pages() -> dict[str, str]:
    """Every page, the generated ones included, which takes longer."""
    return {**written_pages(), **generator().pages()}


def code_blocks() -> list[Code]:
    """The Python code of all pages. That of a generated page is read without generating the rest."""
    examples = {f"blocks/{name}.md": generator().example(name) for name in BLOCKS}
    return [
        Code(page, text[: found.start(2)].count("\n") + 1, found[2], bool(found[1]))
        for page, text in {**written_pages(), **examples}.items()
        for found in CODE.finditer(text)
    ]
