"""`python -m benchmarks.gpu` on the CPU at tiny sizes: parts, report and errors."""

from __future__ import annotations

from pathlib import Path

import pytest

from attention_zoo import BLOCKS
from benchmarks import gpu
from tests.cases import CASES


def run(tmp_path: Path, *arguments: str) -> int:
    return gpu.main([*arguments, "--out", str(tmp_path / "parts"), "--report", str(tmp_path / "gpu.md")])


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = ["--dim", "16", "--heads", "2", "--dim-head", "8", "--runs", "1"]
    monkeypatch.setattr(gpu, "GPT2", [*sizes, "--depth", "1", "--num-tokens", "20", "--lengths", "8"])
    monkeypatch.setattr(gpu, "LENGTHS", {"short": ("8", *sizes)})
    monkeypatch.setattr(gpu, "SHARES", len(CASES))
    monkeypatch.setattr(gpu, "CHECKS", ["shapes", "synchronisation"])
    monkeypatch.setattr("benchmarks.decode.NEW", 2)
    monkeypatch.setattr(gpu, "SIZES", (70,))
    monkeypatch.setattr(gpu, "TRAINING", ["full"])
    monkeypatch.setattr(gpu, "FLEX", ("conv",))


@pytest.mark.usefixtures("small")
def test_parts_are_written_and_joined_to_a_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(tmp_path, "contract-1", "report", "--device", "cpu") == 0
    report = (tmp_path / "gpu.md").read_text()
    assert "1 rows of tests/cases.py: 2 checks without a failure, 0 with one." in report
    assert "Not run: contract-2, contract-3, contract-4, tests, bench-short, bench-long, impl" in report
    assert "torch" in report
    assert "full: shapes passed" in capsys.readouterr().out


@pytest.mark.usefixtures("small")
def test_a_part_that_fails_is_in_the_report_and_the_others_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(name: object, subject: object) -> None:
        raise MemoryError("too large")

    monkeypatch.setattr(gpu, "run_check", fail)
    monkeypatch.setitem(gpu.PARTS, "tests", (lambda device: f"on {device}", ()))
    assert run(tmp_path, "contract-1", "tests", "report", "--device", "cpu") == 1
    report = (tmp_path / "gpu.md").read_text()
    assert "MemoryError: too large" in report
    assert "on cpu" in report


@pytest.mark.slow
@pytest.mark.usefixtures("small")
def test_implementations_are_compared_with_the_reference(tmp_path: Path) -> None:
    assert run(tmp_path, "implementations", "--device", "cpu") == 0
    lines = (tmp_path / "parts" / "implementations.md").read_text().splitlines()
    (first,) = [line for line in lines if line.startswith("- conv, 70 tokens, torch.float32: flex takes ")]
    assert max(float(part.split()[-1]) for part in first.split(", ")[-2:]) < 1e-5
    assert sum("flash-linear-attention" in line for line in lines) == 2


@pytest.mark.slow
@pytest.mark.usefixtures("small")
def test_layers_are_measured_beside_sdpa(tmp_path: Path) -> None:
    assert run(tmp_path, "bench-short", "--device", "cpu") == 0
    text = (tmp_path / "parts" / "bench-short.md").read_text()
    assert {line.split()[0] for line in text.splitlines() if " training " in line} >= {*BLOCKS}


@pytest.mark.slow
@pytest.mark.usefixtures("small")
def test_training_compiles_models(tmp_path: Path) -> None:
    assert run(tmp_path, "training", "--device", "cpu") == 0
    text = (tmp_path / "parts" / "training.md").read_text()
    assert [line.split()[0] for line in text.splitlines() if line.startswith(("full", "gate"))] == gpu.TRAINING


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["bench"], "part must be one of"),
        (["tests", "--device", "gpu"], "device must be one of"),
        (["report"], "out must hold at least one part"),
    ],
)
def test_invalid_arguments_are_reported(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(tmp_path, *arguments) == 2
    assert message in capsys.readouterr().err


def test_without_arguments_the_parts_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu.main([]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == list(gpu.PARTS)
