"""Measure blocks beside torch's own attention, or decoding, memory over segments, recurrences: time, memory, ratio.

A block is measured whole, and its mixing apart: what it does to queries, keys and values that are already projected.
The ratio is mixing over torch's scaled_dot_product_attention (SDPA) of the same shape, timed in turn; SDPA is causal
where the block is, and has the same mask where the block sees a window or an axis of an image. Training is a forward
and a backward pass, to inputs and weights. Peaks are beyond inputs and weights. All times are medians, batch 1.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from attention_zoo._checks import check_choice, check_positive
from attention_zoo._files import write_aside
from attention_zoo.attention import BLOCKS
from attention_zoo.cli._bench.blocks import measure_blocks
from attention_zoo.cli._bench.decode import EARLY, LATE, NEW, PROMPT, measure_decoding
from attention_zoo.cli._bench.measure import Setup, check_device, describe_machine, threads
from attention_zoo.cli._bench.memory import measure_memory
from attention_zoo.cli._bench.recurrence import measure_recurrences
from attention_zoo.cli._bench.results import as_markdown, draw_costs
from attention_zoo.cli._gallery.pictures import new_figure
from attention_zoo.cli._table import format_number, format_row
from attention_zoo.cli._targets import find_block

SIZES = {
    "dim": (512, "features"),
    "heads": (8, "heads"),
    "dim_head": (64, "features of a head"),
    "depth": (6, "layers of the language model that decodes"),
    "runs": (7, "timed runs, of which the median counts"),
    "threads": (1, "CPU threads"),
}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
LENGTHS = [512, 1024, 2048]
KIB = 2**10
MIB = 2**20
NAME = f"<{max(len(name) for name in BLOCKS)}"
COLUMNS = {
    "block": NAME,
    "length": ">6",
    "phase": "<8",
    "block ms": ">8",
    "mixing ms": ">9",
    "SDPA ms": ">7",
    "ratio": ">6",
    "block MiB": ">9",
    "mixing MiB": ">10",
    "SDPA MiB": ">8",
    "tokens/s": ">9",
    "step ms": ">7",
    "state KiB": ">9",
}
MEMORY_COLUMNS = {"what": "<38", "unit": "<4", "ours": ">8", "beside": ">8", "beside/ours": ">11"}
DECODE_COLUMNS = {
    "block": NAME,
    "tokens/s": ">8",
    f"ms at {EARLY}": ">9",
    f"ms at {LATE}": ">10",
    "ratio": ">6",
    f"KiB at {EARLY}": ">10",
    f"KiB at {LATE}": ">11",
}
RECURRENCE_COLUMNS = {
    "what": "<33",
    "rows": ">4",
    "length": ">6",
    "ours ms": ">7",
    "beside ms": ">9",
    "beside/ours": ">11",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options; `check_arguments` looks at their values."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("blocks", nargs="*", metavar="BLOCK", help="names, or module:Class (all; --decode: full)")
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS, metavar="N", help="tokens (512 1024 2048)")
    for name, (default, meaning) in SIZES.items():
        flag = f"--{name.replace('_', '-')}"
        parser.add_argument(flag, type=int, default=default, metavar="N", help=f"{meaning} ({default})")
    parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1, ... (cpu)")
    parser.add_argument("--dtype", default="float32", help=f"{', '.join(DTYPES)} (float32)")
    parser.add_argument("--decode", action="store_true", help="measure how language models of these blocks decode")
    parser.add_argument("--memory", action="store_true", help="measure Memformer, and training by memory replay")
    parser.add_argument("--recurrence", action="store_true", help="measure recurrences with one gate per channel")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write everything measured to this file")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="also write a table of the blocks to this file")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="also draw time and memory against length (PNG)")


def check_arguments(args: argparse.Namespace) -> None:
    """Refuse what cannot be measured before anything is.

    Raises:
        ValueError: an unknown block, dtype or device, a size below 1, or a file that cannot be written.
    """
    for name in args.blocks:
        find_block(name)
    for length in args.lengths:
        check_positive(lengths=length)
    check_positive(**{name: getattr(args, name) for name in SIZES})
    check_choice("dtype", args.dtype, DTYPES)
    check_device(args.device)
    for name in ("json", "markdown", "plot"):
        file = getattr(args, name)
        if file is not None and (file.is_dir() or not file.absolute().parent.is_dir()):
            raise ValueError(f"{name} must be a file in a folder that exists, got {name}={str(file)!r}")
    for name in ("markdown", "plot"):
        if getattr(args, name) is not None and (args.memory or args.recurrence or args.decode):
            raise ValueError(f"{name} is for blocks, and must be left out with --memory, --recurrence or --decode")
    if args.plot is not None:
        new_figure(1, 1)  # says at once what is missing


def run(args: argparse.Namespace) -> int:
    """Measure, print each line as soon as it is known, and write the JSON at the end."""
    check_arguments(args)
    device = check_device(args.device)
    setup = Setup(args.dim, args.heads, args.dim_head, args.depth, args.runs, device, DTYPES[args.dtype])
    with threads(args.threads):
        machine = describe_machine(device)
        print(format_machine(machine))
        print(f"dim {args.dim}, heads {args.heads}, dim_head {args.dim_head}, {args.dtype}, {args.runs} runs\n")
        if args.memory:
            what, rows = "memory", bench_memory(setup)
        elif args.recurrence:
            what, rows = "recurrences", bench_recurrences(setup)
        elif args.decode:
            what, rows = "decoding", bench_decoding(args.blocks or ["full"], setup)
        else:
            what, rows = "blocks", bench_blocks(args.blocks or [*BLOCKS], args.lengths, setup)
    if args.json is not None:
        settings = {name: getattr(args, name) for name in ("device", "dtype", *SIZES)}
        results = {"machine": machine, "settings": settings, what: rows}
        write_aside(args.json, lambda path: Path(path).write_text(json.dumps(results, indent=2) + "\n"))
    if args.markdown is not None:
        text = as_markdown(rows, f"{format_machine(machine)}, {args.dtype}, dim {args.dim}, batch 1")
        write_aside(args.markdown, lambda path: Path(path).write_text(text))
    if args.plot is not None:
        figure = draw_costs(rows, format_machine(machine))
        write_aside(args.plot, lambda path: figure.savefig(path, dpi=100, format="png"))
    return 0


def bench_blocks(names: Sequence[str], lengths: Sequence[int], setup: Setup) -> list[dict[str, Any]]:
    """Print what blocks cost, and return the rows as plain data."""
    layout = [*COLUMNS.values()]
    print(format_row([*COLUMNS], layout))
    rows = []
    for cost in measure_blocks(names, lengths, setup):
        times = (cost.block_ms, cost.mixing_ms, cost.sdpa_ms)
        ratio = f"{format_number(cost.ratio)}{'*' if cost.whole else ' '}"
        peaks = (peak / MIB for peak in (cost.block_bytes, cost.mixing_bytes, cost.sdpa_bytes))
        step = "" if cost.step_ms is None else format_number(cost.step_ms)
        state = "" if cost.state_bytes is None else format_number(cost.state_bytes / KIB)
        ends = (int(cost.tokens_per_second), step, state)
        print(format_row([cost.block, cost.length, cost.phase, *times, ratio, *peaks, *ends], layout), flush=True)
        rows.append(asdict(cost))
    if any(row["whole"] for row in rows):
        print("\n* the whole block, projections included, over SDPA without any")
    return rows


def bench_decoding(names: Sequence[str], setup: Setup) -> list[dict[str, Any]]:
    """Print how language models decode, one per block, and return the rows as plain data."""
    print(f"depth {setup.depth}, {PROMPT} tokens of prompt and {NEW} new ones\n")
    layout = [*DECODE_COLUMNS.values()]
    print(format_row([*DECODE_COLUMNS], layout))
    rows = []
    for name in names:
        found = measure_decoding(name, setup)
        times = (found.tokens_per_second, found.early_ms, found.late_ms, found.ratio)
        cells = (name, *times, found.early_bytes / KIB, found.late_bytes / KIB)
        print(format_row(cells, layout), flush=True)
        rows.append(asdict(found))
    return rows


def bench_memory(setup: Setup) -> list[dict[str, Any]]:
    """Print what memory over segments costs, and return the rows as plain data."""
    layout = [*MEMORY_COLUMNS.values()]
    print(format_row([*MEMORY_COLUMNS], layout))
    rows = []
    for cost in measure_memory(setup):
        print(format_row([cost.what, cost.unit, cost.ours, cost.beside, cost.ratio], layout), flush=True)
        rows.append(asdict(cost))
    return rows


def bench_recurrences(setup: Setup) -> list[dict[str, Any]]:
    """Print what recurrences cost beside copying and beside a tree of steps, and return the rows as plain data."""
    layout = [*RECURRENCE_COLUMNS.values()]
    print(format_row([*RECURRENCE_COLUMNS], layout))
    rows = []
    for cost in measure_recurrences(setup):
        cells = (cost.what, cost.rows, cost.length, cost.ours_ms, cost.beside_ms, cost.ratio)
        print(format_row(cells, layout), flush=True)
        rows.append(asdict(cost))
    return rows


def format_machine(machine: Mapping[str, str | int | None]) -> str:
    """One line of what `describe_machine` found."""
    count = machine["threads"]
    threads_used = f"{count} thread{'' if count == 1 else 's'}"
    parts = [machine["cpu"], threads_used, f"torch {machine['torch']}", machine["gpu"]]
    return ", ".join(str(part) for part in parts if part)
