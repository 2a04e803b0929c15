"""List the attention layers and their capabilities, or which models take them."""

from __future__ import annotations

import argparse
import inspect
import sys
from dataclasses import fields

from torch import nn

from attention_zoo.attention import BLOCKS
from attention_zoo.attention.capabilities import Capabilities, capabilities
from attention_zoo.cli._compatibility import compatibility_table
from attention_zoo.cli._table import print_table

SHORT = {"double_backward": "2nd deriv.", "kv_heads": "kv heads"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("--models", action="store_true", help="print which models take which layer, in Markdown")


def run(args: argparse.Namespace) -> int:
    """Print one row per layer."""
    if args.models:
        print(compatibility_table(), end="")
        return 0
    columns = [field.name for field in fields(Capabilities)]
    rows = [("block", "class", *(SHORT.get(name, name) for name in columns), "what it is")]
    for name, found in capabilities().items():
        cells = (_cell(column, getattr(found, column)) for column in columns)
        rows.append((name, BLOCKS[name].__name__, *cells, describe(BLOCKS[name])))
    print_table(rows)
    print("\nstate: growth of the decoding state with the number of tokens. 2nd deriv.: of the fast implementation;")
    print("inside attention_zoo.reference() every layer has second derivatives.")
    return 0


def describe(cls: type[nn.Module]) -> str:
    """First line of the docstring of the layer's file, or of its class if the file has several layers."""
    several = sum(other.__module__ == cls.__module__ for other in BLOCKS.values()) > 1
    doc = inspect.getdoc(cls if several else sys.modules[cls.__module__]) or ""
    return doc.partition("\n")[0]


def _cell(column: str, value: str | bool) -> str:
    if isinstance(value, bool):
        return "yes" if value else "-"
    return f"O({value})" if column == "state" and value else value or "-"
