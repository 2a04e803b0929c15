"""`python -m benchmarks` in process at tiny sizes: printed tables, JSON files and errors. No test asserts a time."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
import torch

from attention_zoo.cli._bench.setup import Setup
from attention_zoo.ops import channel_gate_loop
from benchmarks import decode
from benchmarks.__main__ import STUDIES, main
from benchmarks.recurrence import tree_gate_loop

ROOT = Path(__file__).parents[2]
TINY = ["--dim", "16", "--heads", "2", "--dim-head", "8", "--depth", "1", "--runs", "1"]


@pytest.fixture
def small_studies(monkeypatch: pytest.MonkeyPatch) -> None:
    """Studies at sizes that run in a second."""
    monkeypatch.setattr("benchmarks.decode.NEW", 8)
    monkeypatch.setattr("benchmarks.memory.LENGTH", 16)
    monkeypatch.setattr("benchmarks.memory.SLOTS", 4)
    monkeypatch.setattr("benchmarks.memory.SEGMENT", 64)
    monkeypatch.setattr("benchmarks.memory.SEGMENTS", (2, 6))
    monkeypatch.setattr("benchmarks.memory.DEPTHS", (6,))
    monkeypatch.setattr("benchmarks.recurrence.SIZES", ((2, 9), (1, 20)))


def results(tmp_path: Path, *options: str) -> dict[str, list[dict[str, object]]]:
    """The JSON file of a run."""
    file = tmp_path / "results.json"
    assert main([*options, *TINY, "--json", str(file)]) == 0
    return json.loads(file.read_text())


@pytest.mark.usefixtures("small_studies")
def test_decoding_rows_have_every_field(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (row,) = results(tmp_path, "decode")["decode"]
    assert set(row) == {field.name for field in fields(decode.Decoding)}
    assert (row["block"], row["depth"], row["new"]) == ("full", 1, 8)
    assert all(row[name] > 0 for name in ("tokens_per_second", "early_ms", "late_ms", "ratio"))
    assert "tokens/s" in capsys.readouterr().out


@pytest.mark.usefixtures("small_studies")
def test_state_of_a_recurrence_is_constant_and_a_cache_grows(tmp_path: Path) -> None:
    loop, full, conv = results(tmp_path, "decode", "--blocks", "gate_loop", "full", "conv")["decode"]
    assert loop["late_bytes"] == loop["early_bytes"]
    assert full["late_bytes"] > 9 * full["early_bytes"]
    assert conv["late_bytes"] == full["late_bytes"]


@pytest.mark.slow
@pytest.mark.usefixtures("small_studies")
def test_memory_study_shows_constant_peak_of_replay(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = results(tmp_path, "memory")["memory"]
    assert [row["unit"] for row in rows] == ["ms", "ms", "MiB", "MiB", "MiB"]
    assert all(row["ours"] > 0 for row in rows)
    two, six, layers = rows[2:]
    assert six["ours"] < 1.2 * two["ours"]  # activations of one segment, for any number of segments
    assert six["beside"] > 2 * two["beside"]
    assert layers["beside"] > 1.5 * layers["ours"]
    assert "replay of 6 segments, beside full" in capsys.readouterr().out


@pytest.mark.usefixtures("small_studies")
def test_recurrence_study_covers_every_size(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = results(tmp_path, "recurrence")["recurrence"]
    assert {(row["rows"], row["length"]) for row in rows} == {(2, 9), (1, 20)}
    assert all(row["ours_ms"] > 0 and row["beside_ms"] > 0 and row["ratio"] > 0 for row in rows)
    assert "scan: gate loop, beside a tree" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.usefixtures("small_studies")
def test_all_studies_run_by_default(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = results(tmp_path)
    assert [*found] == ["machine", "settings", *STUDIES]
    assert all(found[name] for name in STUDIES)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].endswith(f"torch {torch.__version__}")
    assert [line for line in lines if line in STUDIES] == [*STUDIES]


def test_associative_scan_baseline_equals_the_reference() -> None:
    q, k, v, z = (torch.randn(2, 21, 3, *last, dtype=torch.float64) for last in ((), (), (), (2,)))
    want = channel_gate_loop(q, k, v, z, impl="reference").out
    assert torch.allclose(tree_gate_loop(q, k, v, z), want, atol=1e-12)


def test_cross_attention_cannot_be_decoded_without_a_context() -> None:
    setup = Setup(dim=16, heads=2, dim_head=8, runs=1, device=torch.device("cpu"), dtype=torch.float32)
    with pytest.raises(ValueError, match="context"):
        decode.measure_decoding("cross", setup, depth=1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["decod"], "did you mean 'decode'?"),
        (["decode", "--blocks", "ful"], "did you mean 'full'?"),
        (["decode", "--depth", "0"], "depth must be at least 1"),
        (["memory", "--runs", "0"], "runs must be at least 1"),
        (["recurrence", "--json", "no/such/folder/file.json"], "json must be a file"),
    ],
)
def test_invalid_options_are_reported_in_one_line(
    options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(options) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert err.startswith("benchmarks: ")
    assert message in err


@pytest.mark.slow
def test_documented_command_has_help() -> None:
    command = [sys.executable, "-m", "benchmarks", "--help"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.startswith("usage: python -m benchmarks")
