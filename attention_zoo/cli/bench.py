"""Measure time and memory of attention layers, compared with torch's scaled_dot_product_attention (SDPA).

A layer is measured as a whole, and its mixing separately: what it computes from queries, keys and values without the
projections. The ratio is mixing over SDPA of the same shape, timed alternately. SDPA is causal if the layer is, and
has the same mask for layers that attend to a window or an axis of an image. Training is a forward and a backward pass,
to inputs and weights. Peak memory excludes inputs and weights. Times are medians, on a CUDA
device by events in its stream.

--model measures training steps of a language model with each layer instead, in tokens per second beside the same model
with full attention: loss, backward and AdamW, in the dtype by autocast. Names joined by + are cycled over the depth.

--packed measures whole layers on documents of different lengths instead: packed into rows, padded to the longest, and
one at a time. The lengths are those of the standard library's files, four bytes per token, cut to the length of a row.
Speeds count valid tokens only.
"""

from __future__ import annotations

import argparse
from dataclasses import asdict
from functools import partial
from pathlib import Path

from attention_zoo._checks import check_at_least, check_positive
from attention_zoo._files import write_aside
from attention_zoo.attention import BLOCKS
from attention_zoo.cli._bench.blocks import measure_blocks
from attention_zoo.cli._bench.models import decoder_blocks, measure_models, print_models
from attention_zoo.cli._bench.packed import (
    describe_documents,
    document_lengths,
    measure_packed,
    packable_blocks,
    print_packed,
)
from attention_zoo.cli._bench.results import as_markdown, draw_costs, print_costs
from attention_zoo.cli._bench.setup import (
    add_setup_arguments,
    add_size,
    check_file,
    format_machine,
    format_sizes,
    measuring,
    write_json,
)
from attention_zoo.cli._figure import new_figure
from attention_zoo.cli._targets import find_block

LENGTHS = [512, 1024, 2048]
PACKED_LENGTH = 2048


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    add = parser.add_argument
    add("blocks", nargs="*", metavar="BLOCK", help="layer names, or module:Class (default: all layers)")
    add(
        "--lengths",
        type=int,
        nargs="+",
        metavar="N",
        help="numbers of tokens (default: 512 1024 2048), or tokens per packed row (default: 2048)",
    )
    add_size(parser, "batch", 1, "batch size")
    add("--compile", action="store_true", help="run layers and models under torch.compile")
    add("--model", action="store_true", help="compare training steps of language models")
    add_size(parser, "depth", 12, "layers of --model")
    add_size(parser, "num_tokens", 50304, "vocabulary of --model")
    add("--packed", action="store_true", help="compare packed rows with padded rows and separate documents")
    add("--documents", type=int, default=16, metavar="N", help="number of documents of --packed (default: 16)")
    add_setup_arguments(parser)
    add("--markdown", type=Path, metavar="FILE", help="also write a table to this Markdown file")
    add("--plot", type=Path, metavar="FILE", help="also plot time and memory against length to this PNG file")


def run(args: argparse.Namespace) -> int:
    """Measure, print each row as soon as it is known, and write the files."""
    lengths = args.lengths or LENGTHS
    names = args.blocks or [*BLOCKS]
    for name in names:
        for part in name.split("+") if args.model else [name]:
            find_block(part)
    for length in lengths:
        check_positive(lengths=length)
    if args.packed and args.model:
        raise ValueError("packed must be omitted with --model, got both")
    if args.packed:
        return run_packed(args)
    if args.model:
        return run_model(args)
    check_file("markdown", args.markdown)
    check_file("plot", args.plot)
    if args.plot is not None:
        new_figure(1, 1)  # raises early if matplotlib is missing
    with measuring(args) as (setup, machine):
        costs = print_costs(measure_blocks(names, lengths, setup), names)
    write_json(args, machine, blocks=[asdict(cost) for cost in costs])
    title = format_machine(machine)
    if args.markdown is not None:
        text = as_markdown(costs, f"{title}, {format_sizes(setup)}")
        write_aside(args.markdown, lambda path: Path(path).write_text(text))
    if args.plot is not None:
        write_aside(args.plot, partial(draw_costs, costs, title))
    return 0


def run_model(args: argparse.Namespace) -> int:
    """Measure training steps of language models."""
    check_positive(depth=args.depth, num_tokens=args.num_tokens)
    _no_pictures(args, "model")
    names = decoder_blocks(args.blocks)
    with measuring(args) as (setup, machine):
        print(f"depth {args.depth}, {args.num_tokens:,} tokens\n")
        costs = print_models(measure_models(names, args.lengths or LENGTHS, args.depth, args.num_tokens, setup), names)
    write_json(args, machine, models=[asdict(cost) for cost in costs])
    return 0


def _no_pictures(args: argparse.Namespace, option: str) -> None:
    for name in ("markdown", "plot"):
        if getattr(args, name) is not None:
            raise ValueError(f"{name} must be omitted with --{option}, got {name}={str(getattr(args, name))!r}")


def run_packed(args: argparse.Namespace) -> int:
    """Measure packed rows, padded rows and separate documents."""
    lengths = args.lengths or [PACKED_LENGTH]
    for length in lengths:
        check_at_least(2, lengths=length)
    check_positive(documents=args.documents)
    _no_pictures(args, "packed")
    if args.batch != 1 or args.compile:
        raise ValueError(f"batch and compile must be omitted with --packed, got {args.batch=}, {args.compile=}")
    names = packable_blocks(args.blocks)
    sizes = document_lengths(lengths, args.documents)
    with measuring(args) as (setup, machine):
        print("\n".join(describe_documents(length, sizes[length]) for length in sizes), end="\n\n")
        costs = print_packed(measure_packed(names, sizes, setup), names)
    write_json(args, machine, packed=[asdict(cost) for cost in costs])
    return 0
