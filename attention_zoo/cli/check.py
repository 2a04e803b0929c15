"""Check that an attention layer satisfies the contract: one line per check, exit status 1 if a check fails.

The same in a test:

    check_block(lambda: MyAttention(64), dim=64, causal=True).raise_for_failures()
"""

from __future__ import annotations

import argparse
from functools import partial

import torch
from torch import Tensor

from attention_zoo._checks import check_choice, check_positive
from attention_zoo.cli._table import print_rows
from attention_zoo.cli._targets import find_block, make_block, read_arguments, reads_context
from attention_zoo.testing import CHECKS, Subject, run_check
from attention_zoo.testing.report import FAILED

COLUMNS = {"check": f"<{max(map(len, CHECKS))}", "outcome": f"<{len('not applicable')}", "what": "<4"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    add = parser.add_argument
    add("block", metavar="BLOCK", help="layer name, or module:Class")
    add("--arguments", metavar="JSON", help="constructor arguments other than dim, e.g. '{\"heads\": 4}'")
    add("--dim", type=int, default=32, help="number of input features (default: 32)")
    add(
        "--lengths",
        type=int,
        nargs="+",
        default=Subject.lengths,
        metavar="N",
        help="numbers of tokens (default: 1 ... 131)",
    )
    add("--bidirectional", action="store_true", help="do not require causality")
    add("--checks", nargs="+", metavar="CHECK", default=list(CHECKS), help="checks to run (default: all)")


def run(args: argparse.Namespace) -> int:
    """Run the checks and print each outcome as soon as it is known."""
    check_positive(dim=args.dim)
    for length in args.lengths:
        check_positive(lengths=length)
    for name in args.checks:
        check_choice("check", name, CHECKS)
    arguments = read_arguments(args.arguments)
    dim = arguments.get("dim", args.dim)
    build = partial(make_block, find_block(args.block), args.block, dim, arguments)
    block = build()
    streams = getattr(block, "streams", 1)

    def context(batch: int, length: int) -> dict[str, Tensor]:
        return {"context": torch.randn(batch, 5, getattr(block, "context_dim", dim))}

    subject = Subject(
        build,
        dim=dim,
        causal=not args.bidirectional and bool(getattr(block, "causal", True)),
        lengths=args.lengths,
        inputs=context if reads_context(block) else None,
        streams=streams if streams > 1 else None,
        shift_invariant=getattr(block, "layout", None) is None,
        gradient_is_exact=getattr(block, "gradient_fraction", 1.0) == 1.0,
    )
    outcomes = (run_check(name, subject) for name in args.checks)
    printed = print_rows(COLUMNS, outcomes, lambda outcome: (outcome.check, outcome.status, outcome.message))
    failed = sum(outcome.status == FAILED for outcome in printed)
    if failed:
        print(f"\n{args.block} fails {failed} of {len(args.checks)} checks.")
    return int(failed > 0)
