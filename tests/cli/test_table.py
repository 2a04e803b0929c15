"""Tables of aligned columns."""

from __future__ import annotations

import pytest

from attention_zoo.cli._table import format_number, format_row, print_rows, print_table


def test_numbers_have_three_significant_digits_and_no_exponent() -> None:
    numbers = (7, 0.1234, 9.876, 12.34, 123456.7)
    assert [format_number(number) for number in numbers] == ["7", "0.12", "9.88", "12.3", "123457"]


def test_row_follows_its_layout() -> None:
    assert format_row(["full", 5, 1.5], ["<6", ">4", ">6"]) == "full       5    1.50"


def test_print_rows_prints_a_header_and_returns_the_items(capsys: pytest.CaptureFixture[str]) -> None:
    items = print_rows({"name": "<5", "size": ">4"}, iter([3, 40]), lambda item: ("row", item))
    assert items == [3, 40]
    assert capsys.readouterr().out.splitlines() == ["name   size", "row       3", "row      40"]


def test_print_table_fits_columns_to_their_cells(capsys: pytest.CaptureFixture[str]) -> None:
    print_table([("a", "b"), ("long", "c")])
    assert capsys.readouterr().out.splitlines() == ["a     b", "long  c"]
