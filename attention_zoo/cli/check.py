"""Check that an attention layer or a model satisfies the contract.

One line per check; exit status 1 if a check fails. With --num-tokens the target is a model, from token ids to logits.
On a CUDA device the check "synchronisation" runs under torch.cuda.set_sync_debug_mode("error"). The same in a test:

    check_block(lambda: MyAttention(64), dim=64, causal=True).raise_for_failures()
    check_model(lambda: MyModel(256), num_tokens=256).raise_for_failures()
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from attention_zoo._checks import check_choice, check_positive
from attention_zoo.cli._bench.setup import check_device
from attention_zoo.cli._table import print_rows
from attention_zoo.cli._targets import (
    MODELS,
    find_block,
    layout_for,
    make_block,
    make_model,
    read_arguments,
    reads_context,
    required,
)
from attention_zoo.ops import TextImageLayout
from attention_zoo.testing import CHECKS, MODEL_CHECKS, Subject, make_model_subject, run_check
from attention_zoo.testing.report import FAILED
from attention_zoo.testing.subject import LENGTHS, LONG_LENGTHS

COLUMNS = {"check": f"<{max(map(len, [*CHECKS, *MODEL_CHECKS]))}", "outcome": f"<{len('not applicable')}", "what": "<4"}
LAYOUT_LENGTH = 300  # tokens of the layout of an image layer: more than layers compute without tiles
WINDOW = 20  # tokens of a window that is not given


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    add = parser.add_argument
    add("target", metavar="TARGET", help="name of a layer, or with --num-tokens of a model; or module:Class")
    add("--arguments", metavar="JSON", help="constructor arguments other than dim, e.g. '{\"heads\": 4}'")
    add("--num-tokens", type=int, metavar="V", help="the target is a model of V tokens")
    add("--dim", type=int, default=32, help="number of features (default: 32)")
    add("--lengths", type=int, nargs="+", metavar="N", help="numbers of tokens (default: from 1 to about a hundred)")
    add("--bidirectional", action="store_true", help="do not require causality")
    add("--effort", choices=["quick", "full"], default="full", help="full also checks long sequences (default: full)")
    add("--strict", action="store_true", help="invalid arguments must raise clear errors in your own classes too")
    add("--device", default="cpu", help="cpu, cuda, cuda:1, ... (default: cpu)")
    add("--checks", nargs="+", metavar="CHECK", help="checks to run (default: all)")


def run(args: argparse.Namespace) -> int:
    """Run the checks and print each outcome as soon as it is known."""
    check_positive(dim=args.dim, num_tokens=args.num_tokens)
    for length in args.lengths or ():
        check_positive(lengths=length)
    check_device(args.device)
    known = CHECKS if args.num_tokens is None else MODEL_CHECKS
    names = list(known) if args.checks is None else args.checks
    for name in names:
        check_choice("check", name, known)
    if args.target in MODELS and args.num_tokens is None:
        raise ValueError(f"{args.target} is a model: give --num-tokens")
    subject = _block(args) if args.num_tokens is None else _model(args)
    outcomes = (run_check(name, subject) for name in names)
    printed = print_rows(COLUMNS, outcomes, lambda outcome: (outcome.check, outcome.status, outcome.message))
    failed = sum(outcome.status == FAILED for outcome in printed)
    if failed:
        print(f"\n{args.target} fails {failed} of {len(names)} checks.")
    return int(failed > 0)


def _model(args: argparse.Namespace) -> Subject:
    make = find_block(args.target, MODELS, "model")
    build = partial(make_model, make, args.target, args.num_tokens, args.dim, read_arguments(args.arguments))
    return make_model_subject(
        build,
        num_tokens=args.num_tokens,
        causal=not args.bidirectional,
        lengths=args.lengths or (),
        strict=args.strict or None,
        effort=args.effort,
        device=args.device,
    )


def _block(args: argparse.Namespace) -> Subject:
    arguments = read_arguments(args.arguments)
    dim = arguments.get("dim", args.dim)
    make = find_block(args.target)
    arguments = required(make, layout=layout_for(max(args.lengths or [LAYOUT_LENGTH])), window=WINDOW) | arguments
    build = partial(make_block, make, args.target, dim, arguments)
    block = build()
    lengths: Sequence[int] = args.lengths or ()
    long_lengths: Sequence[int] = ()
    layout = getattr(block, "layout", None)
    if isinstance(layout, TextImageLayout) and not lengths:  # those that fit, and the whole layout
        fit = sorted({n for n in (*LENGTHS, *LONG_LENGTHS, layout.length) if n <= layout.length})
        lengths = [n for n in fit if n <= max(LENGTHS)]
        long_lengths = [n for n in fit if n > max(LENGTHS)] if args.effort == "full" else ()
    streams = getattr(block, "streams", 1)

    def context(batch: int, length: int) -> dict[str, Tensor]:
        return {"context": torch.randn(batch, 5, getattr(block, "context_dim", dim))}

    return Subject(
        build,
        dim=dim,
        causal=not args.bidirectional and bool(getattr(block, "causal", True)),
        lengths=lengths,
        long_lengths=long_lengths,
        inputs=context if reads_context(block) else None,
        streams=streams if streams > 1 else None,
        shift_invariant=getattr(block, "layout", None) is None,
        gradient_is_exact=getattr(block, "gradient_fraction", 1.0) == 1.0,
        strict=args.strict or None,
        effort=args.effort,
        device=args.device,
    )
