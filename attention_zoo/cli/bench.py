"""Measure time and memory of attention layers, compared with torch's scaled_dot_product_attention (SDPA).

A layer is measured as a whole, and its mixing separately: what it computes from queries, keys and values without the
projections. The ratio is mixing over SDPA of the same shape, timed alternately. SDPA is causal if the layer is, and
has the same mask for layers that attend to a window or an axis of an image. Training is a forward and a backward pass,
to inputs and weights. Peak memory excludes inputs and weights. Times are medians, with batch size 1.
"""

from __future__ import annotations

import argparse
from dataclasses import asdict
from functools import partial
from pathlib import Path

from attention_zoo._checks import check_positive
from attention_zoo._files import write_aside
from attention_zoo.attention import BLOCKS
from attention_zoo.cli._bench.blocks import measure_blocks
from attention_zoo.cli._bench.results import as_markdown, draw_costs, print_costs
from attention_zoo.cli._bench.setup import add_setup_arguments, check_file, format_machine, measuring, write_json
from attention_zoo.cli._figure import new_figure
from attention_zoo.cli._targets import find_block

LENGTHS = [512, 1024, 2048]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    add = parser.add_argument
    add("blocks", nargs="*", metavar="BLOCK", help="layer names, or module:Class (default: all layers)")
    add(
        "--lengths",
        type=int,
        nargs="+",
        default=LENGTHS,
        metavar="N",
        help="numbers of tokens (default: 512 1024 2048)",
    )
    add_setup_arguments(parser)
    add("--markdown", type=Path, metavar="FILE", help="also write a table to this Markdown file")
    add("--plot", type=Path, metavar="FILE", help="also plot time and memory against length to this PNG file")


def run(args: argparse.Namespace) -> int:
    """Measure, print each row as soon as it is known, and write the files."""
    names = args.blocks or [*BLOCKS]
    for name in names:
        find_block(name)
    for length in args.lengths:
        check_positive(lengths=length)
    check_file("markdown", args.markdown)
    check_file("plot", args.plot)
    if args.plot is not None:
        new_figure(1, 1)  # raises early if matplotlib is missing
    with measuring(args) as (setup, machine):
        costs = print_costs(measure_blocks(names, args.lengths, setup), names)
    write_json(args, machine, blocks=[asdict(cost) for cost in costs])
    title = format_machine(machine)
    if args.markdown is not None:
        text = as_markdown(costs, f"{title}, {args.dtype}, dim {args.dim}, batch 1")
        write_aside(args.markdown, lambda path: Path(path).write_text(text))
    if args.plot is not None:
        write_aside(args.plot, partial(draw_costs, costs, title))
    return 0
