"""List the blocks of the zoo and what they can do."""

from __future__ import annotations

import argparse
import inspect
import sys
from dataclasses import fields

from attention_zoo.attention import BLOCKS, AttentionBlock
from attention_zoo.attention.capabilities import Capabilities, capabilities
from attention_zoo.cli._table import fit_columns, format_row

SHORT = {"double_backward": "2nd deriv.", "kv_heads": "kv heads"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """No options."""


def run(args: argparse.Namespace) -> int:
    """Print one line per block."""
    columns = [field.name for field in fields(Capabilities)]
    rows = [("block", "class", *(SHORT.get(name, name) for name in columns), "what it is")]
    for name, found in capabilities().items():
        cls = BLOCKS[name]
        rows.append((name, cls.__name__, *(_cell(column, getattr(found, column)) for column in columns), describe(cls)))
    layout = fit_columns(rows)
    for row in rows:
        print(format_row(row, layout))
    print("\nstate: how the decoding state grows with the tokens before. 2nd deriv.: on the fast path; inside")
    print("attention_zoo.reference() every block has them.")
    return 0


def describe(cls: type[AttentionBlock]) -> str:
    """What a block is: the first line of its file, or of its class where a file holds several blocks."""
    several = sum(other.__module__ == cls.__module__ for other in BLOCKS.values()) > 1
    doc = inspect.getdoc(cls if several else sys.modules[cls.__module__]) or ""
    return doc.partition("\n")[0]


def _cell(column: str, value: str | bool) -> str:
    if isinstance(value, bool):
        return "yes" if value else "-"
    return f"O({value})" if column == "state" and value else value or "-"
