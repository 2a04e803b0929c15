"""Hold a block, the zoo's or your own, to the contract: one line a check, exit status 1 where one fails.

In a test file it is one line:

    check_block(lambda: MyAttention(64), dim=64, causal=True).raise_for_failures()
"""

from __future__ import annotations

import argparse
import inspect
from collections.abc import Mapping
from functools import partial

import torch
from torch import Tensor, nn

from attention_zoo._checks import check_choice, check_positive
from attention_zoo.cli._table import fit_columns, format_row
from attention_zoo.cli._targets import find_block, make_block, read_arguments
from attention_zoo.testing import CHECKS, Subject, run_check
from attention_zoo.testing.report import FAILED

LENGTHS = [1, 2, 7, 64, 65, 131]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What to check and how."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("block", metavar="BLOCK", help="module:Class, or a block's name")
    parser.add_argument("--arguments", metavar="JSON", help="of the constructor beside dim, as in '{\"heads\": 4}'")
    parser.add_argument("--dim", type=int, default=32, help="features of the input (32)")
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS, metavar="N", help="tokens (1 ... 131)")
    parser.add_argument("--bidirectional", action="store_true", help="the block does not promise to hide the future")
    parser.add_argument("--checks", nargs="+", metavar="CHECK", default=list(CHECKS), help="which checks (all)")


def run(args: argparse.Namespace) -> int:
    """Check, and print each line as soon as it is known."""
    check_positive(dim=args.dim)
    for length in args.lengths:
        check_positive(lengths=length)
    for name in args.checks:
        check_choice("check", name, CHECKS)
    arguments = read_arguments(args.arguments)
    dim = arguments.get("dim", args.dim)
    build = partial(make_block, find_block(args.block), args.block, dim, arguments)
    block = build()
    subject = Subject(
        build,
        dim=dim,
        causal=not args.bidirectional and bool(getattr(block, "causal", True)),
        lengths=tuple(args.lengths),
        inputs=partial(_context, block) if "context" in inspect.signature(block.forward).parameters else None,
        streams=streams if (streams := getattr(block, "streams", 1)) > 1 else None,
        shift_invariant=getattr(block, "layout", None) is None,
        gradient_is_exact=getattr(block, "gradient_fraction", 1.0) == 1.0,
    )
    layout = fit_columns([("check", "outcome"), *((name, "not applicable") for name in CHECKS)])
    print(format_row(("check", "outcome", "what"), (*layout, "<4")))
    failed = 0
    for name in args.checks:
        outcome = run_check(name, subject)
        failed += outcome.status == FAILED
        print(format_row((name, outcome.status, outcome.message), (*layout, "<4")), flush=True)
    if failed:
        print(f"\n{args.block} fails {failed} of {len(args.checks)} checks.")
    return int(failed > 0)


def _context(block: nn.Module, batch: int, length: int) -> Mapping[str, Tensor]:
    """Another sequence for a block that reads one."""
    features = getattr(block, "context_dim", getattr(block, "dim", None))
    if not isinstance(features, int):
        raise ValueError("the block must say how many features its context has, in an attribute context_dim or dim")
    return {"context": torch.randn(batch, 5, features)}
