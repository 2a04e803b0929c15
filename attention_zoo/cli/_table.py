"""Tables of aligned text columns."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TypeVar

Item = TypeVar("Item")
Cells = Sequence[str | float]


def format_number(number: float) -> str:
    """Format without exponent: three significant digits, at most two decimals."""
    decimals = 0 if isinstance(number, int) or abs(number) >= 100 else 1 if abs(number) >= 10 else 2
    return f"{number:.{decimals}f}"


def format_row(cells: Cells, layout: Iterable[str]) -> str:
    """One line of a table.

    Args:
        cells: text, or numbers, formatted by `format_number`.
        layout: alignment and minimum width in characters of each column, e.g. "<12" (left) or ">6" (right).
    """
    texts = (cell if isinstance(cell, str) else format_number(cell) for cell in cells)
    return "  ".join(format(text, place) for text, place in zip(texts, layout, strict=True)).rstrip()


def print_rows(columns: Mapping[str, str], items: Iterable[Item], cells: Callable[[Item], Cells]) -> list[Item]:
    """Print a header and one row per item, each as soon as `items` yields it.

    Args:
        columns: layout of each column by its title, see `format_row`.
        items: items to print.
        cells: cells of one item.

    Returns:
        The items.
    """
    print(format_row([*columns], columns.values()))
    printed = []
    for item in items:
        print(format_row(cells(item), columns.values()), flush=True)
        printed.append(item)
    return printed


def print_table(rows: Sequence[Sequence[str]]) -> None:
    """Print rows of text, the first one the header, with columns as wide as their longest cell."""
    layout = [f"<{max(map(len, column))}" for column in zip(*rows, strict=True)]
    for row in rows:
        print(format_row(row, layout))
