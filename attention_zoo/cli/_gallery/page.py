"""One HTML page with everything in it, readable on a phone."""

from __future__ import annotations

import base64
import html
import importlib
import inspect
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; margin: 0 auto; max-width: 60rem; padding: 1rem; color: #222; }
h1 { line-height: 1.2; } h2 { border-top: 1px solid #ccc; padding-top: 1.5rem; overflow-wrap: anywhere; }
figure { margin: 1rem 0; } figcaption { font-size: .85rem; }
img { max-width: 100%; height: auto; display: block; }
pre { background: #f4f4f4; padding: .75rem; overflow-x: auto; border-radius: .3rem; font-size: .85rem; }
nav a { display: inline-block; margin: 0 .6rem .3rem 0; } code { overflow-wrap: anywhere; }
@media (prefers-color-scheme: dark) { body { background: #161616; color: #ddd; } pre { background: #262626; }
  img { background: #fff; } a { color: #8ab4ff; } h2 { border-color: #444; } }
"""


@dataclass(frozen=True)
class Entry:
    """What the page shows of one block.

    Attributes:
        name: of the block.
        make: its class or function.
        pictures: PNG files, with what each shows.
    """

    name: str
    make: Any
    pictures: Sequence[tuple[Path, str]]


def write_page(entries: Sequence[Entry], path: Path) -> None:
    """Write the page; the pictures are inside it."""
    links = "".join(f'<a href="#{html.escape(entry.name)}">{html.escape(entry.name)}</a>' for entry in entries)
    body = "\n".join(_section(entry) for entry in entries)
    path.write_text(
        f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>attention_zoo: who sees whom</title><style>{STYLE}</style></head><body>
<h1>attention_zoo: who sees whom</h1>
<p>Measured, not declared: how strongly each output of a block depends on each input (the norm of the gradient, over
random inputs), and the attention map of a small language model on a real sentence. Brighter is stronger, by the square
root.</p>
<nav>{links}</nav>
{body}
</body></html>
""",
        encoding="utf-8",
    )


def _section(entry: Entry) -> str:
    about = describe(entry.make)
    name = html.escape(entry.name)
    papers = ", ".join(f'<a href="{link}">{link.rpartition("/")[2]}</a>' for link in about.papers)
    pictures = "\n".join(
        f'<figure><img alt="{html.escape(caption)}" src="data:image/png;base64,'
        f'{base64.b64encode(path.read_bytes()).decode()}"><figcaption>{html.escape(caption)}</figcaption></figure>'
        for path, caption in entry.pictures
    )
    parts = [
        f'<h2 id="{name}">{name}</h2>',
        f"<p>{html.escape(about.what)}</p>" if about.what else "",
        f"<p><code>{html.escape(about.equation)}</code></p>" if about.equation else "",
        f"<p>{html.escape(about.cost)}</p>" if about.cost else "",
        f"<p>Papers: {papers}</p>" if papers else "",
        f"<pre>{html.escape(about.snippet)}</pre>",
        pictures,
    ]
    return "\n".join(part for part in parts if part)


@dataclass(frozen=True)
class About:
    """What a block's own docstrings say.

    Attributes:
        what: the first line of its file.
        equation: the first sentence of its class.
        cost: time, memory and state.
        papers: links.
        snippet: three lines that run it.
    """

    what: str
    equation: str
    cost: str
    papers: list[str]
    snippet: str


def describe(make: Any) -> About:
    """Read the docstrings of a block's class and file."""
    file = inspect.getdoc(sys.modules[make.__module__]) or ""
    doc = inspect.getdoc(make) or ""
    if inspect.isclass(make) and "Time" not in doc:  # a thin subclass: its parent has the story
        doc = inspect.getdoc(inspect.getmro(make)[1]) or doc
    story = re.sub(r"\s+", " ", doc.partition("Args:")[0])
    cost = " ".join(re.findall(r"(?:Time|State)\b.*?\.(?= |$)", story))
    equation = re.sub(r"\s+", " ", doc.partition("\n\n")[0])
    papers = re.findall(r"https://arxiv\.org/abs/[\d.]*\d", file)
    return About(file.partition("\n")[0], equation, cost, list(dict.fromkeys(papers)), _snippet(make))


def _snippet(make: Any) -> str:
    takes = inspect.signature(make).parameters
    ours = make.__module__.startswith("attention_zoo.")
    at_top = ours and make.__name__ in importlib.import_module("attention_zoo").__all__
    module = "attention_zoo" if at_top else "attention_zoo.attention" if ours else make.__module__
    layout = ", layout=TextImageLayout(text_len=16, height=8, width=8)" if "layout" in takes else ""
    names = f"{make.__name__}, TextImageLayout" if layout and at_top else make.__name__
    more = "from attention_zoo import TextImageLayout\n" if layout and not at_top else ""
    context = ", context" if "context" in inspect.signature(getattr(make, "forward", make)).parameters else ""
    return f"{more}from {module} import {names}\nblock = {make.__name__}(512{layout})\nout = block(x{context})"
