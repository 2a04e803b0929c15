"""The HTML page of the gallery, a single file that contains all pictures."""

from __future__ import annotations

import base64
import importlib
import inspect
import re
import sys
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any, NamedTuple

from attention_zoo.cli._targets import required

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
PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>attention_zoo: receptive fields and attention maps</title><style>{style}</style></head><body>
<h1>attention_zoo: receptive fields and attention maps</h1>
<p>The receptive field of a layer is measured: the norm of the gradient of each output with respect to each input, over
random inputs. The attention map is that of a small language model on a sentence. Brighter is stronger, on a square root
scale.</p>
<nav>{links}</nav>
{body}
</body></html>
"""


class Entry(NamedTuple):
    """A layer on the page.

    Attributes:
        name: name of the layer.
        make: its class or function.
        pictures: PNG files and their captions.
    """

    name: str
    make: Any
    pictures: Sequence[tuple[Path, str]]


class About(NamedTuple):
    """What the docstrings of a layer say.

    Attributes:
        what: first line of the file.
        equation: first paragraph of the class.
        cost: sentences about time, memory and state.
        papers: links.
        snippet: code that runs the layer.
    """

    what: str
    equation: str
    cost: str
    papers: list[str]
    snippet: str


def write_page(entries: Sequence[Entry], path: Path) -> None:
    """Write the page."""
    links = "".join(f'<a href="#{escape(entry.name)}">{escape(entry.name)}</a>' for entry in entries)
    body = "\n".join(_section(entry) for entry in entries)
    path.write_text(PAGE.format(style=STYLE, links=links, body=body), encoding="utf-8")


def _section(entry: Entry) -> str:
    about, name = describe(entry.make), escape(entry.name)
    papers = ", ".join(f'<a href="{link}">{link.rpartition("/")[2]}</a>' for link in about.papers)
    parts = [
        f'<h2 id="{name}">{name}</h2>',
        about.what and f"<p>{escape(about.what)}</p>",
        about.equation and f"<p><code>{escape(about.equation)}</code></p>",
        about.cost and f"<p>{escape(about.cost)}</p>",
        papers and f"<p>Papers: {papers}</p>",
        f"<pre>{escape(about.snippet)}</pre>",
    ]
    for picture, caption in entry.pictures:
        data, text = base64.b64encode(picture.read_bytes()).decode(), escape(caption)
        image = f'<img alt="{text}" src="data:image/png;base64,{data}">'
        parts.append(f"<figure>{image}<figcaption>{text}</figcaption></figure>")
    return "\n".join(part for part in parts if part)


def describe(make: Any) -> About:
    """Read the docstrings of a layer's class and file."""
    file = inspect.getdoc(sys.modules[make.__module__]) or ""
    doc = inspect.getdoc(make) or ""
    if inspect.isclass(make) and "Time" not in doc:  # a subclass that refers to its parent
        doc = inspect.getdoc(make.__base__) or doc
    text = re.sub(r"\s+", " ", doc.partition("Args:")[0])
    cost = " ".join(re.findall(r"(?:Time|State)\b.*?\.(?= |$)", text))
    equation = re.sub(r"\s+", " ", doc.partition("\n\n")[0])
    papers = re.findall(r"https://arxiv\.org/abs/[\d.]*\d", file)
    return About(file.partition("\n")[0], equation, cost, list(dict.fromkeys(papers)), _snippet(make))


def _snippet(make: Any) -> str:
    module, arguments, inputs = make.__module__, "512", "x"
    if module.startswith("attention_zoo."):
        exported = make.__name__ in importlib.import_module("attention_zoo").__all__
        module = "attention_zoo" if exported else "attention_zoo.attention"
    names = {module: [make.__name__]}
    if required(make, window=None):
        arguments += ", window=128"
    if "layout" in inspect.signature(make).parameters:
        arguments += ", layout=TextImageLayout(text_len=16, height=8, width=8)"
        names.setdefault("attention_zoo", []).append("TextImageLayout")
    if "context" in inspect.signature(getattr(make, "forward", make)).parameters:
        inputs += ", context"
    lines = [f"from {module} import {', '.join(found)}" for module, found in names.items()]
    return "\n".join([*lines, f"block = {make.__name__}({arguments})", f"out = block({inputs})"])
