"""`attention-zoo list`."""

from __future__ import annotations

import io
import subprocess
import sys
from contextlib import redirect_stdout
from pathlib import Path

import pytest

from attention_zoo.attention import BLOCKS
from attention_zoo.cli import main
from attention_zoo.cli.list import describe


@pytest.fixture(scope="module")
def printed() -> str:
    out = io.StringIO()
    with redirect_stdout(out):
        assert main(["list"]) == 0
    return out.getvalue()


@pytest.fixture
def tables(printed: str) -> list[list[str]]:
    """The lines of the table of descriptions, of the table of capabilities, and of the notes."""
    return [part.splitlines() for part in printed.split("\n\n")]


def test_list_shows_every_layer_with_its_class_and_description(tables: list[list[str]]) -> None:
    header, *lines = tables[0]
    assert header.split()[:2] == ["block", "class"]
    start = header.index("what it is")
    named = [line.split()[:2] for line in lines if not line.startswith(" ")]
    assert named == [[name, cls.__name__] for name, cls in BLOCKS.items()]
    assert " ".join(line[start:] for line in lines) == " ".join(describe(cls) for cls in BLOCKS.values())


def test_list_shows_growth_of_states_and_optional_causality(tables: list[list[str]]) -> None:
    rows = {line.split()[0]: line.split()[1:6] for line in tables[1]}
    assert rows["full"] == ["opt", "pair", "yes", "yes", "O(n)"]
    assert rows["gate_loop"] == ["opt", "key", "yes", "yes", "O(1)"]


def test_list_shows_what_a_layer_takes(tables: list[list[str]]) -> None:
    column = tables[1][0].split().index("takes")
    taken = {line.split()[0]: line.split()[column] for line in tables[1][1:]}
    want = {"full": "-", "cross": "context", "conv": "layout", "talking_heads": "streams"}
    assert {name: taken[name] for name in want} == want


def test_list_aligns_its_columns(tables: list[list[str]]) -> None:
    for (header, *lines), titles in zip(tables, (["class", "what it is"], ["causal", "2nd", "kv"]), strict=False):
        for title in titles:
            start = header.index(title)
            assert all(line[start - 1] == " " for line in lines)
            assert any(line[start] != " " for line in lines)


def test_list_fits_100_columns(printed: str) -> None:
    assert max(map(len, printed.splitlines())) <= 100


@pytest.mark.slow
def test_list_compiles_no_kernel() -> None:
    code = "import sys; from attention_zoo.cli import main; main(['list']); assert 'numba' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)


def test_the_table_of_models_in_the_documentation_is_the_printed_one(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list", "--models"]) == 0
    printed = capsys.readouterr().out
    assert "| `gate_loop` | yes |" in printed
    assert printed in (Path(__file__).parents[2] / "docs" / "compatibility.md").read_text()
