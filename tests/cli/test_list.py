"""`attention-zoo list`."""

from __future__ import annotations

from pathlib import Path

import pytest

from attention_zoo.attention import BLOCKS
from attention_zoo.cli import main


@pytest.fixture
def table(capsys: pytest.CaptureFixture[str]) -> list[str]:
    """The lines of the printed table, without the notes below it."""
    assert main(["list"]) == 0
    return capsys.readouterr().out.split("\n\n")[0].splitlines()


def test_list_shows_every_layer_with_its_class(table: list[str]) -> None:
    header, *lines = table
    assert header.split()[:4] == ["block", "class", "causal", "mask"]
    assert [line.split()[:2] for line in lines] == [[name, cls.__name__] for name, cls in BLOCKS.items()]


def test_list_shows_growth_of_states_and_optional_causality(table: list[str]) -> None:
    rows = {line.split()[0]: line.split()[2:6] for line in table}
    assert rows["full"] == ["optional", "yes", "yes", "O(n)"]
    assert rows["gate_loop"] == ["always", "yes", "yes", "O(1)"]


def test_list_aligns_its_columns(table: list[str]) -> None:
    header, *lines = table
    for title in ("class", "causal", "context", "what it is"):
        start = header.index(title)
        assert all(line[start - 1] == " " and line[start] != " " for line in lines)


def test_the_table_of_models_in_the_documentation_is_the_printed_one(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list", "--models"]) == 0
    printed = capsys.readouterr().out
    assert "| `gate_loop` | yes |" in printed
    assert printed in (Path(__file__).parents[2] / "docs" / "compatibility.md").read_text()
