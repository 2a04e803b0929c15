"""Tables of aligned text columns."""

from __future__ import annotations

from collections.abc import Sequence

GAP = "  "


def format_row(cells: Sequence[str | float], layout: Sequence[str]) -> str:
    """One line of a table.

    Args:
        cells: text, or numbers, which get three significant digits.
        layout: per column, where it stands and its least width in characters: "<12" on the left, ">6" on the right.
    """
    texts = (cell if isinstance(cell, str) else format_number(cell) for cell in cells)
    return GAP.join(format(text, place) for text, place in zip(texts, layout, strict=True)).rstrip()


def format_number(number: float) -> str:
    """The number with at least three significant digits and no exponent, two decimals at most."""
    decimals = 0 if isinstance(number, int) or abs(number) >= 100 else 1 if abs(number) >= 10 else 2
    return f"{number:.{decimals}f}"


def fit_columns(rows: Sequence[Sequence[str]]) -> list[str]:
    """The layout, all on the left, in which every cell of these rows fits."""
    return [f"<{max(len(cell) for cell in column)}" for column in zip(*rows, strict=True)]
