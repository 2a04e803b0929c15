"""Run performance studies at fixed sizes.

    python -m benchmarks                # all studies
    python -m benchmarks decode         # decoding speed and state of language models
    python -m benchmarks memory         # memory across segments and recomputed activations
    python -m benchmarks recurrence     # recurrences with one gate per channel

Times are medians.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import asdict

from attention_zoo._checks import check_choice, check_positive
from attention_zoo.attention import BLOCKS
from attention_zoo.cli._bench.setup import add_setup_arguments, add_size, measuring, write_json
from benchmarks import decode, memory, recurrence

STUDIES = {"decode": decode, "memory": memory, "recurrence": recurrence}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the studies and print each row as soon as it is known.

    Args:
        argv: arguments after the program name. None: those of the process.

    Returns:
        Exit status: 0, or 2 if an argument is invalid, with one line on stderr.
    """
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("studies", nargs="*", metavar="STUDY", help=f"{', '.join(STUDIES)} (default: all)")
    parser.add_argument(
        "--blocks", nargs="+", default=["full"], metavar="BLOCK", help="decode: attention layers (default: full)"
    )
    add_size(parser, "depth", 6, "decode: layers of the language model")
    add_setup_arguments(parser)
    args = parser.parse_args(argv)
    names = args.studies or list(STUDIES)
    results = {}
    try:
        for name in names:
            check_choice("study", name, STUDIES)
        for block in args.blocks:
            check_choice("block", block, BLOCKS)
        check_positive(depth=args.depth)
        with measuring(args) as (setup, machine):
            for name in names:
                if len(names) > 1:
                    print(f"{name}\n")
                results[name] = [asdict(row) for row in STUDIES[name].run(setup, args)]
                print()
        write_json(args, machine, **results)
    except (ValueError, OSError) as error:
        print(f"benchmarks: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
