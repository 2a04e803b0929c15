"""List the blocks of the zoo."""

from __future__ import annotations

import argparse
import inspect
import sys

from attention_zoo.attention import BLOCKS, AttentionBlock
from attention_zoo.cli.table import fit_columns, format_row

HEADER = ("block", "class", "causal", "context", "what it is")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """No options."""


def run(args: argparse.Namespace) -> int:
    """Print one line per block."""
    rows = [HEADER, *(describe(name, cls) for name, cls in BLOCKS.items())]
    layout = fit_columns(rows)
    for row in rows:
        print(format_row(row, layout))
    return 0


def describe(name: str, cls: type[AttentionBlock]) -> tuple[str, str, str, str, str]:
    """The row of one block: its name, its class, whether it is causal, whether it reads a context, what it is.

    A block is causal unless asked otherwise, so the question is whether it can be asked: "optional", or "always".
    """
    causal = "optional" if "causal" in inspect.signature(cls).parameters else "always"
    context = "needed" if "context" in inspect.signature(cls.forward).parameters else "-"
    doc = inspect.getdoc(sys.modules[cls.__module__]) or ""
    return name, cls.__name__, causal, context, doc.partition("\n")[0]
