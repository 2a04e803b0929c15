"""The command line: one file is one command, and COMMANDS names them all."""

from __future__ import annotations

import argparse
import inspect
import os
import sys
from collections.abc import Sequence
from typing import Protocol

import attention_zoo.cli.bench as bench
import attention_zoo.cli.check as check
import attention_zoo.cli.convert as convert
import attention_zoo.cli.gallery as gallery
import attention_zoo.cli.list as listing


class Command(Protocol):
    """What the module of a command has; the first line of its docstring is its help."""

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """Declare the options."""

    def run(self, args: argparse.Namespace) -> int:
        """Do it, and return the exit status."""


COMMANDS: dict[str, Command] = {
    "list": listing,
    "bench": bench,
    "check": check,
    "convert": convert,
    "gallery": gallery,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: the arguments after the program's name; None takes those of the process.

    Returns:
        The exit status: the command's own, or 2 where an argument does not fit, which one line on stderr then says.
    """
    parser = argparse.ArgumentParser(prog="attention-zoo", description="Interchangeable attention blocks for PyTorch.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, command in COMMANDS.items():
        doc = inspect.getdoc(command) or ""
        command.add_arguments(commands.add_parser(name, help=doc.partition("\n")[0], description=doc))
    args = parser.parse_args(argv)
    try:
        status = COMMANDS[args.command].run(args)
        sys.stdout.flush()
        return status
    except BrokenPipeError:  # whoever reads, `head` say, has seen enough; nor may the flush at exit fail on it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (ValueError, ImportError, OSError) as error:  # what users can put right; anything else shows where it broke
        print(f"attention-zoo {args.command}: {error}", file=sys.stderr)
        return 2


__all__ = ["COMMANDS", "Command", "main"]
