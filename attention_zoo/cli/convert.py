"""Convert a checkpoint of an upstream package to model.safetensors and config.json for `attention_zoo.interop.load`.

Prints the new name of each weight. No code stored in the checkpoint is executed.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from attention_zoo.cli._table import print_table
from attention_zoo.cli._targets import read_arguments
from attention_zoo.interop import PACKAGES, convert


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    add = parser.add_argument
    add("package", metavar="PACKAGE", help=f"one of {', '.join(PACKAGES)}")
    add("cls", metavar="CLASS", help="class the weights belong to, e.g. Transformer")
    add("weights", metavar="WEIGHTS", type=Path, help="file written by torch.save")
    add("out", metavar="OUT_DIR", type=Path, help="output folder")
    add("--arguments", type=Path, metavar="JSON", help="JSON file with the constructor arguments of the class, by name")


def run(args: argparse.Namespace) -> int:
    """Convert the checkpoint and print the names."""
    names = convert(args.package, args.cls, args.weights, args.out, arguments=read_arguments(args.arguments))
    print_table([("old name", "became"), *names.items()])
    print(f"\n{args.package} {args.cls} is in {args.out}. It loads with attention_zoo.interop.load({str(args.out)!r}).")
    return 0
