"""List the attention layers and their capabilities, or which models take them."""

from __future__ import annotations

import argparse
import inspect
import sys
import textwrap

from torch import nn

from attention_zoo.attention import BLOCKS
from attention_zoo.attention.capabilities import Capabilities, capabilities
from attention_zoo.cli._compatibility import compatibility_table
from attention_zoo.cli._table import print_table

WIDTH = 100  # characters of a line
NOTES = """
causal: always, or optional. mask: padding of keys, or also attn_mask for pairs of query and key. doc: packed
documents. jit: torch.compile(fullgraph=True). state: growth of the decoding state with the number of tokens.
2nd: second derivatives of the fast implementation; inside attention_zoo.reference() every layer has them.
takes: an argument that the layer has beyond the features. rope: rotary position embedding. kv: grouped key/value heads.
qkn: norms of queries and keys. drop: dropout of the attention weights."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("--models", action="store_true", help="print which models take which layer, in Markdown")


def run(args: argparse.Namespace) -> int:
    """Print one row per layer."""
    if args.models:
        print(compatibility_table(), end="")
        return 0
    names = max(map(len, BLOCKS))
    classes = max(len(cls.__name__) for cls in BLOCKS.values())
    rows = [("block", "class", "what it is")]
    for name, cls in BLOCKS.items():
        first, *others = textwrap.wrap(describe(cls), max(40, WIDTH - names - classes - 4))
        rows += [(name, cls.__name__, first), *(("", "", line) for line in others)]
    print_table(rows)
    print()
    found = {name: _cells(can) for name, can in capabilities().items()}
    print_table([("block", *next(iter(found.values()))), *((name, *cells.values()) for name, cells in found.items())])
    print("\n".join(["", *textwrap.wrap(NOTES.strip(), WIDTH)]))
    return 0


def describe(cls: type[nn.Module]) -> str:
    """First line of the docstring of the layer's file, or of its class if the file has several layers."""
    several = sum(other.__module__ == cls.__module__ for other in BLOCKS.values()) > 1
    doc = inspect.getdoc(cls if several else sys.modules[cls.__module__]) or ""
    return doc.partition("\n")[0]


def _cells(can: Capabilities) -> dict[str, str]:
    """The cells of a layer by column."""
    taken = {"context": can.context, "layout": can.image, "streams": can.streams}
    cells = {
        "causal": can.causal.replace("optional", "opt"),
        "mask": "pair" if can.attn_mask else "key" if can.mask else "",
        "doc": can.documents,
        "step": can.step,
        "state": can.state and f"O({can.state})",
        "map": can.map,
        "jit": can.compile,
        "2nd": can.double_backward,
        "takes": ", ".join(name for name, takes in taken.items() if takes),
        "rope": can.rotary,
        "bias": can.bias,
        "kv": can.kv_heads,
        "qkn": can.qk_norm,
        "drop": can.dropout,
    }
    return {title: "yes" if cell is True else str(cell or "-") for title, cell in cells.items()}
