"""Generated pages of the documentation: one per block, and the API reference. A hook of MkDocs.

Facts of a block come from `capabilities()`, from the docstrings of its class and file, from docs/blocks.toml and from a
measurement, the gallery's. Equations between dollar signs become MathML, so that the site needs no script for them.
"""

from __future__ import annotations

import contextlib
import importlib
import inspect
import io
import pkgutil
import re
import sys
import tempfile
import tomllib
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import attention_zoo
from attention_zoo import BLOCKS, Capabilities
from attention_zoo import capabilities as measure_capabilities
from attention_zoo.attention import AxialColumnAttention, AxialRowAttention

FACTS: dict[str, dict[str, str]] = tomllib.loads(Path(__file__).with_name("blocks.toml").read_text())
YES_NO = {True: "yes", False: "no"}
LABELS = {
    "causal": "Causal",
    "mask": "Padding mask",
    "attn_mask": "`attn_mask`",
    "documents": "Packed documents (`document_ids`)",
    "step": "Incremental decoding (`step`)",
    "map": "`attention_map`",
    "compile": "`torch.compile(fullgraph=True)`",
    "double_backward": "Second derivatives without `reference()`",
    "rotary": "Rotary position embedding",
    "bias": "Relative position bias",
    "kv_heads": "Grouped key/value heads",
    "qk_norm": "Query-key norm",
    "dropout": "Dropout of the weights",
}


# ---------------------------------------------------------------------------------------------------------- blocks


@cache
def capabilities() -> dict[str, Capabilities]:
    """The capabilities of all blocks, computed once."""
    return measure_capabilities()


def block_page(name: str) -> str:
    """The page of one block."""
    cls, facts, found = BLOCKS[name], FACTS[name], capabilities()[name]
    what, header = _file_header(cls)
    rows = [(label, getattr(found, field)) for field, label in LABELS.items() if hasattr(found, field)]
    table = [f"| {label} | {YES_NO.get(value, value) if isinstance(value, bool) else value} |" for label, value in rows]
    return "\n\n".join(
        [
            f"# {name}",
            what,
            f"$$ {facts['equation']} $$",
            facts["where"],
            f"## Who attends to whom\n\n![Receptive field of {name}]({name}.png)\n\nMeasured with random weights: the "
            "norm of the gradient of each output with respect to each input"
            + (", for a few outputs, marked by a cross, over a text and an image." if found.image else "."),
            "## Cost\n\n" + _cost(cls) + f"\n\nDecoding state: ${_as_tex(facts['state'])}$ elements per row, "
            f"$O({found.state})$ in the number of tokens. Letters: n tokens, d = `dim`, h = `heads`, e = `dim_head`.",
            f"## When to use it\n\n{facts['use']}\n\n## When not\n\n{facts['avoid']}\n\n"
            "The numbers are those of [Benchmarks](../benchmarks.md).",
            "## Example\n\n" + example(name),
            "## What it supports\n\n| | |\n|---|---|\n" + "\n".join(table) + "\n\nWhich models take it: "
            "[Which model takes which block](../compatibility.md).",
            "## Sources\n\n" + header,
            "## API\n\n" + _api(cls),
        ]
    )


def _documented(cls: type) -> type:
    """The class with the arguments: the parent of the two axial classes."""
    return cls.__base__ if cls in (AxialRowAttention, AxialColumnAttention) else cls  # type: ignore[return-value]


def _api(cls: type) -> str:
    path = path_of(_documented(cls), "")
    if cls is AxialColumnAttention:  # the page of the other axis has it
        return f'[`AxialAttention`](axial_row.md#{path}) with axis="column".'
    return f"::: {path}"


def _file_header(cls: type) -> tuple[str, str]:
    """The first line of a file's docstring, and the paragraphs Paper, Upstream and Differs as a list."""
    what, _, rest = (sys.modules[cls.__module__].__doc__ or "").partition("\n")
    text = re.sub(r"\s+", " ", rest).strip()
    text = re.sub(r"(https://\S*\w)", r"<\1>", text)
    return what, re.sub(r" ?(?:^|(?<= ))(Papers?|Upstream|Differs): ", r"\n- **\1**: ", text).strip()


def _cost(cls: type) -> str:
    """The sentences about time, memory and state of a class docstring, with formulas between dollar signs."""
    text = re.sub(r"\s+", " ", (inspect.getdoc(_documented(cls)) or "").partition("Args")[0])
    sentences = re.findall(r"(?:^|(?<=\. ))((?:Time|Memory|State)\b.*?\.)(?= |$)", text)
    return re.sub(
        r"O\((?:[^()]|\((?:[^()]|\([^()]*\))*\))*\)", lambda found: f"${_as_tex(found[0])}$", " ".join(sentences)
    )


def _as_tex(formula: str) -> str:
    """A formula as TeX, with names of several letters upright."""
    names = re.sub(r"[a-z]{2,}(?:_[a-z]+)*", lambda name: rf"\mathrm{{{name[0]}}}".replace("_", r"\_"), formula)
    return re.sub(r" ?\* ?|(?<=[\w})]) (?=[\w\\(])", r" \\, ", names)


def example(name: str) -> str:
    """Runnable code: the block as a module, decoding, and a model of it."""
    cls = BLOCKS[name]
    takes = inspect.signature(cls).parameters
    image, reads_context = "layout" in takes, "context" in inspect.signature(cls.forward).parameters
    arguments = ["64", *(["heads=4", "dim_head=16"] if "dim_head" in takes else [])]
    names, setup, context = [cls.__name__], [], ""
    if image:
        names.append("TextImageLayout")
        setup.append("layout = TextImageLayout(text_len=8, height=4, width=4)")
        arguments.append("layout=layout")
    needs_window = "window" in takes and takes["window"].default is inspect.Parameter.empty
    if needs_window:
        arguments.append("window=4")
    if reads_context:
        setup.append("context = torch.randn(2, 10, 64)")
        context = ", context"
    models = {True: "EncoderDecoder", False: "LanguageModel"}
    public = "attention_zoo" if cls.__name__ in attention_zoo.__all__ else "attention_zoo.attention"
    others = sorted([*names[1:], models[reads_context]])
    imports = (
        [f"from attention_zoo import {', '.join(sorted([*names, models[reads_context]]))}"]
        if public == "attention_zoo"
        else [f"from attention_zoo import {', '.join(others)}", f"from {public} import {cls.__name__}"]
    )
    given = '"layout": layout' if image else '"window": 4' if needs_window else ""
    options = f'("{name}", {{{given}}})' if given else f'"{name}"'
    model = (
        'EncoderDecoder(num_tokens=256, dim=64, enc_depth=1, dec_depth=1)  # its decoder has "cross" blocks'
        if reads_context
        else f"LanguageModel(num_tokens=256, dim=64, depth=2, attention={options})"
    )
    lines = [
        "import torch",
        *imports,
        "",
        *setup,
        f"block = {cls.__name__}({', '.join(arguments)})",
        "x = torch.randn(2, 12, 64)",
        f"out = block(x{context})  # (2, 12, 64)",
        "",
        "block.eval()",
        f"out, state = block.step(x[:, :8]{', context=context' if context else ''})",
        "new, state = block.step(x[:, 8:9], state)  # one more token",
        "",
        f"model = {model}",
    ]
    return "```python\n" + "\n".join(lines) + "\n```"


def picture(name: str) -> bytes:
    """The receptive field of a block, as the command `gallery` draws it."""
    from attention_zoo.cli._gallery.pictures import draw_field
    from attention_zoo.cli.gallery import _measure

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"{name}.png"
        draw_field(_measure(name, BLOCKS[name], 64, {}), name, path)
        return path.read_bytes()


# ------------------------------------------------------------------------------------------------------- reference


def public_modules() -> Iterator[ModuleType]:
    """Every module of the package with `__all__`, the package itself first, then those of its folders."""
    yield attention_zoo
    found = pkgutil.walk_packages(attention_zoo.__path__, "attention_zoo.")
    names = [info.name for info in found if info.ispkg and "._" not in info.name]
    for name in sorted(names, key=lambda name: (name.count("."), name)):
        module = importlib.import_module(name)
        if hasattr(module, "__all__"):
            yield module


def path_of(value: Any, default: str) -> str:
    """The dotted path of a class or function where it is defined; `default` for other values."""
    if (inspect.isclass(value) or inspect.isfunction(value)) and value.__module__.startswith("attention_zoo"):
        return f"{value.__module__}.{value.__qualname__}"
    return default


def reference_pages() -> dict[str, str]:
    """One page per module. A name is described where it is first exported, blocks on their own pages."""
    described = {path_of(_documented(cls), ""): f"../blocks/{name}.md" for name, cls in reversed(BLOCKS.items())}
    pages = {}
    for module in public_modules():
        name, page = module.__name__, f"{module.__name__}.md"
        lines = [f"# {name}", inspect.cleandoc(module.__doc__ or "").partition("\n\nExample")[0]]
        links, entries = [], []
        for public in sorted(module.__all__, key=str.lower):
            value = getattr(module, public)
            path = path_of(value, f"{name}.{public}")
            summary = (inspect.getdoc(value) or "").partition("\n")[0] if path != f"{name}.{public}" else ""
            if public == "__version__":
                links.append(f"- `{public}`: the version of the package.")
                continue
            if module is attention_zoo and path not in described:
                home = _exporter(public, value)
                described_at = f"{home}.md#{path_of(value, f'{home}.{public}')}"
                links.append(f"- [`{public}`]({described_at}){_dash(summary)}")
            elif path in described:
                links.append(f"- [`{public}`]({described[path]}#{path}){_dash(summary)}")
            else:
                described[path] = page
                entries.append(f"::: {path}")
        if module is attention_zoo:
            lines.append("Every name can be imported from `attention_zoo` itself.")
        pages[page] = "\n\n".join([*lines, "\n".join(links), *entries])
    return pages


def _exporter(public: str, value: Any) -> str:
    """The first package below the top that exports a name."""
    return next(
        module.__name__
        for module in public_modules()
        if module is not attention_zoo and public in module.__all__ and getattr(module, public) is value
    )


def _dash(summary: str) -> str:
    return f": `{summary}`" if re.search(r"[*_=<\[]", summary) and "`" not in summary else summary and f": {summary}"


def checks_table(checks: dict[str, Any]) -> str:
    """The contract checks with the first lines of their docstrings, as in verified.md."""
    rows = [f"| {name} | {(inspect.getdoc(check) or '').partition(chr(10))[0]} |" for name, check in checks.items()]
    return "\n".join(["| check | what must hold |", "|---|---|", *rows])


def command_line_page() -> str:
    """The help of every command."""
    from attention_zoo.cli import COMMANDS, main

    parts = ["# Command line", "`attention-zoo COMMAND`, or `python -m attention_zoo COMMAND`."]
    for command in COMMANDS:
        with contextlib.redirect_stdout(io.StringIO()) as printed, contextlib.suppress(SystemExit):
            main([command, "--help"])
        parts.append(f"## {command}\n\n```text\n{printed.getvalue()}```")
    return "\n\n".join(parts)


def pages() -> dict[str, str]:
    """All generated pages by path."""
    blocks = {f"blocks/{name}.md": block_page(name) for name in BLOCKS}
    reference = {"command_line.md": command_line_page(), **reference_pages()}
    return blocks | {f"reference/{name}": text for name, text in reference.items()}


# ------------------------------------------------------------------------------------------------ hooks of MkDocs


def on_config(config: Any) -> Any:
    """Add the generated pages to the navigation, before the section "About"."""
    found = pages()
    for title, folder in (("Blocks", "blocks/"), ("API reference", "reference/")):
        entries = [{path[len(folder) : -len(".md")]: path} for path in found if path.startswith(folder)]
        config.nav.insert(-1, {title: entries})
    return config


def on_files(files: Any, config: Any) -> Any:
    """Add the generated pages and pictures to the files."""
    from mkdocs.structure.files import File

    for path, text in pages().items():
        files.append(File.generated(config, path, content=text))
    for name in BLOCKS:
        files.append(File.generated(config, f"blocks/{name}.png", content=picture(name)))
    for path in sorted((Path(__file__).parents[1] / "examples" / "pictures").glob("*.png")):
        files.append(File.generated(config, f"pictures/{path.name}", content=path.read_bytes()))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Replace equations between dollar signs, outside code, by MathML, and paths of pictures by those in the site."""
    from latex2mathml.converter import convert

    markdown = markdown.replace("](../examples/pictures/", "](pictures/")
    parts = re.split(r"(^```.*?^```|`[^`\n]*`)", markdown, flags=re.MULTILINE | re.DOTALL)
    for index in range(0, len(parts), 2):
        parts[index] = re.sub(r"\$\$(.+?)\$\$", lambda found: convert(found[1].strip(), display="block"), parts[index])
        # Without the span, Markdown takes a line that starts with <math> for a block.
        parts[index] = re.sub(r"\$([^$\n]+)\$", lambda found: f"<span>{convert(found[1])}</span>", parts[index])
    return "".join(parts)
