"""Options and progress of a training script."""

from __future__ import annotations

import argparse
import shutil
import sys
import time
from collections import deque
from collections.abc import Callable, Sequence
from statistics import median
from typing import Any, Self, TextIO

import torch

from attention_zoo._checks import check_at_least, check_positive

LINES = 10  # lines of a run without a terminal, at least
MOST_SECONDS = 60.0  # between two lines without a terminal
SLOWER = 8  # times the fastest step from which steps are called slow
SLOW_SECONDS = 0.1  # by which they are slower at least: short steps vary


def parse_options(
    parser: argparse.ArgumentParser, argv: Sequence[str] | None = None, *, any_integer: Sequence[str] = ("seed",)
) -> argparse.Namespace:
    """Parse the command line of a training script, with the option `--threads` added, and set the number of threads.

    Exits with a one-line message if an option of type int is below 1.

    Args:
        parser: the other options.
        argv: arguments after the program name. None: those of the process.
        any_integer: names of options that may be any integer.
    """
    if "--threads" not in parser._option_string_actions:
        parser.add_argument("--threads", type=int, help="number of CPU threads (chosen by torch)")
    options = parser.parse_args(argv)
    integers = [action.dest for action in parser._actions if action.type is int and action.dest not in any_integer]
    for name in integers:
        value = getattr(options, name)
        if value is not None and value < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1, got {value}")
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    return options


class Progress:
    """Progress of a training loop: one line that is rewritten on a terminal, or else about ten lines in total.

    Prints a hint, once, when steps take far longer than the fastest one, as they do with more threads than idle cores.

        with Progress(steps) as progress:
            for _ in range(steps):
                ...
                progress.update(f"loss {loss:.3f}")

    Args:
        total: number of steps.
        start: steps done before.
        name: what the line begins with.
        quiet: print nothing.
        file: where to print. None: stderr.
        clock: seconds since some time.

    Attributes:
        done: steps done.
        rate: steps per second, the median of the last steps; 0 before the first.
    """

    def __init__(
        self,
        total: int,
        *,
        start: int = 0,
        name: str = "",
        quiet: bool = False,
        file: TextIO | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        check_positive(total=total)
        check_at_least(0, start=start)
        self.total, self.done, self.name, self.quiet, self.clock = total, start, name, quiet, clock
        self.file = sys.stderr if file is None else file
        self.terminal = self.file.isatty()
        self._last: deque[float] = deque(maxlen=5)
        self._fastest, self._hinted, self._width = float("inf"), False, 0
        self._since = self._printed = clock()

    def __enter__(self) -> Self:
        self._since = self._printed = self.clock()
        return self

    def __exit__(self, *_: Any) -> None:
        self._end()

    @property
    def rate(self) -> float:
        return 1 / max(median(self._last), 1e-9) if self._last else 0.0

    def update(self, text: str = "") -> None:
        """Count one step, and print `text` with the number of steps."""
        now = self.clock()
        seconds, self._since = now - self._since, now
        self._last.append(seconds)
        self._fastest = min(self._fastest, seconds)
        self.done += 1
        tenth = self.done * LINES // self.total > (self.done - 1) * LINES // self.total
        pause = 0.1 if self.terminal else MOST_SECONDS
        if now - self._printed >= pause or self.done == self.total or (tenth and not self.terminal):
            self._printed = now
            left = (self.total - self.done) / self.rate
            parts = [f"step {self.done}/{self.total}", text, f"{self.rate:.3g} steps/s", f"{left:.0f} s left"]
            self._print(f"{self.name}: " * bool(self.name) + ", ".join(part for part in parts if part))
        if self.done == self.total:
            self._end()
        slow = median(self._last)
        if len(self._last) == 5 and slow > SLOWER * self._fastest and slow > self._fastest + SLOW_SECONDS:
            self._hint(slow)

    def write(self, text: str) -> None:
        """Print a line of results to stdout. The time since the last step does not count as a step."""
        if not self.quiet:
            self._clear()
            print(text, flush=True)
        self._since = self.clock()

    def _hint(self, slow: float) -> None:
        if self._hinted or self.quiet:
            return
        self._hinted = True
        self._clear()
        print(
            f"hint: a step takes {slow:.2g} s, {slow / self._fastest:.0f} times as long as the fastest. If other "
            f"programs use the CPU, fewer threads than the {torch.get_num_threads()} in use are often faster: "
            f"--threads 1",
            file=self.file,
            flush=True,
        )

    def _print(self, line: str) -> None:
        if self.quiet:
            return
        if self.terminal:
            line = line[: shutil.get_terminal_size().columns - 1]  # a longer line could not be rewritten
            print(f"\r{line:<{self._width}}", end="", file=self.file, flush=True)
            self._width = len(line)
        else:
            print(line, file=self.file, flush=True)

    def _end(self) -> None:
        """Leave the line on the terminal."""
        if self._width:
            print(file=self.file)
            self._width = 0

    def _clear(self) -> None:
        """Remove the line from the terminal, so that another one can be printed."""
        if self.terminal and self._width:
            print(f"\r{'':<{self._width}}\r", end="", file=self.file, flush=True)
            self._width = 0
