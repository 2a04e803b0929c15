"""Turn an old checkpoint of another package into one that loads here, number for number.

Writes model.safetensors and config.json, which `attention_zoo.interop.load` reads, and prints what became what. Nothing
in the old file is executed.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from attention_zoo.cli._table import fit_columns, format_row
from attention_zoo.interop import PACKAGES, convert


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The packages and where things are."""
    parser.add_argument("package", metavar="PACKAGE", help=f"one of {', '.join(PACKAGES)}")
    parser.add_argument("cls", metavar="CLASS", help="the class whose weights they are, Transformer say")
    parser.add_argument("weights", metavar="WEIGHTS", type=Path, help="a file that torch.save wrote")
    parser.add_argument("out", metavar="OUT_DIR", type=Path, help="the folder to write")
    parser.add_argument(
        "--arguments", type=Path, metavar="JSON", help="a file with what the class's constructor was given, by name"
    )


def run(args: argparse.Namespace) -> int:
    """Convert, and say what became what."""
    arguments = {}
    if args.arguments is not None:
        try:
            arguments = json.loads(args.arguments.read_text(encoding="utf-8"))
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise ValueError(f"--arguments must be a JSON file, got {args.arguments}: {error}") from error
        if not isinstance(arguments, dict):
            raise ValueError(f"--arguments must hold an object, names and values, got {type(arguments).__name__}")
    account = convert(args.package, args.cls, args.weights, args.out, arguments=arguments)
    rows = [("old name", "became"), *account.items()]
    layout = fit_columns(rows)
    for row in rows:
        print(format_row(row, layout))
    print(f"\n{args.package} {args.cls} is in {args.out}. It loads with attention_zoo.interop.load({str(args.out)!r}).")
    return 0
