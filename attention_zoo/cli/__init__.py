"""Command line: `attention-zoo COMMAND` or `python -m attention_zoo COMMAND`.

Each command is a module with `add_arguments(parser)` and `run(args)`, which returns the exit status. Its docstring is
its help text.
"""

from __future__ import annotations

import argparse
import inspect
import os
import sys
from collections.abc import Sequence
from types import ModuleType

import attention_zoo
from attention_zoo.cli import bench, check, convert, gallery
from attention_zoo.cli import list as listing

__all__ = ["COMMANDS", "main"]

COMMANDS: dict[str, ModuleType] = {
    "list": listing,
    "bench": bench,
    "check": check,
    "convert": convert,
    "gallery": gallery,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: arguments after the program name. None: those of the process.

    Returns:
        Exit status: that of the command, or 2 if an argument is invalid, with one line on stderr.
    """
    parser = argparse.ArgumentParser(prog="attention-zoo", description="Interchangeable attention layers for PyTorch.")
    parser.add_argument("--version", action="version", version=f"attention_zoo {attention_zoo.__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, command in COMMANDS.items():
        doc = inspect.getdoc(command) or ""
        subparser = commands.add_parser(name, help=doc.partition("\n")[0], description=doc)
        subparser.formatter_class = argparse.RawDescriptionHelpFormatter
        command.add_arguments(subparser)
    args = parser.parse_args(argv)
    try:
        status = COMMANDS[args.command].run(args)
        sys.stdout.flush()
        return status
    except BrokenPipeError:  # the reader, e.g. `head`, has closed the pipe; the flush at exit must not fail either
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (ValueError, ImportError, OSError) as error:  # errors of the user; others keep their traceback
        print(f"attention-zoo {args.command}: {error}", file=sys.stderr)
        return 2
