"""The command line in process, at tiny sizes: what it prints, writes and refuses. No test looks at how fast it is."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from attention_zoo.attention import BLOCKS, AttentionBlock, CosineSimAttention, FullAttention
from attention_zoo.cli import COMMANDS, main
from attention_zoo.cli._bench import decode as decoding
from attention_zoo.cli._bench.blocks import PHASES, BlockCost, measure_block, mixing
from attention_zoo.cli._bench.decode import Decoding
from attention_zoo.cli._bench.measure import Setup, compare, describe_machine, peak_bytes, seconds, threads
from attention_zoo.cli._bench.recurrence import tree_mixing
from attention_zoo.cli._table import format_number, format_row
from attention_zoo.ops.gate_loop import channel_gate_loop

CPU = torch.device("cpu")
TINY = Setup(dim=16, heads=2, dim_head=8, depth=1, runs=2, device=CPU, dtype=torch.float32)
TINY_OPTIONS = ["--dim", "16", "--heads", "2", "--dim-head", "8", "--depth", "1", "--runs", "2"]
MB = 10**6


class Averaging(AttentionBlock):
    """A block of a kind that the bench does not know."""

    def __init__(self, dim: int) -> None:
        super().__init__(dim, heads=2, dim_head=8)
        self.to_out = nn.Linear(dim, dim)

    def forward(self, x: Tensor, *, mask: Tensor | None = None) -> Tensor:
        out: Tensor = self.to_out(x.cumsum(1) / torch.arange(1, x.shape[1] + 1)[:, None])
        return out


def listed(capsys: pytest.CaptureFixture[str]) -> list[str]:
    """The table that `list` prints, without what follows it."""
    assert main(["list"]) == 0
    return capsys.readouterr().out.split("\n\n")[0].splitlines()


def test_list_shows_every_block_with_its_class(capsys: pytest.CaptureFixture[str]) -> None:
    header, *lines = listed(capsys)
    assert header.split()[:4] == ["block", "class", "causal", "mask"]
    assert [line.split()[:2] for line in lines] == [[name, cls.__name__] for name, cls in BLOCKS.items()]


def test_list_says_how_states_grow_and_who_may_be_bidirectional(capsys: pytest.CaptureFixture[str]) -> None:
    rows = {line.split()[0]: line.split()[2:6] for line in listed(capsys)}
    assert rows["full"] == ["optional", "yes", "yes", "O(n)"]
    assert rows["gate_loop"] == ["always", "yes", "yes", "O(1)"]


def test_columns_of_the_list_are_aligned(capsys: pytest.CaptureFixture[str]) -> None:
    header, *lines = listed(capsys)
    for title in ("class", "causal", "context", "what it is"):
        start = header.index(title)
        assert all(line[start - 1] == " " and line[start] != " " for line in lines)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_json_of_the_bench_has_every_field_of_every_block_length_and_phase(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], dtype: str
) -> None:
    file = tmp_path / "bench.json"
    assert main(["bench", "--lengths", "4", "9", "--dtype", dtype, "--json", str(file), *TINY_OPTIONS]) == 0
    found = json.loads(file.read_text())
    assert found["machine"] == describe_machine(CPU) | {"threads": 1}
    sizes = {"dim": 16, "heads": 2, "dim_head": 8, "depth": 1, "runs": 2, "threads": 1}
    assert found["settings"] == {"device": "cpu", "dtype": dtype, **sizes}
    rows = found["blocks"]
    want = [(name, length, phase) for name in BLOCKS for length in (4, 9) for phase in PHASES]
    assert [(row["block"], row["length"], row["phase"]) for row in rows] == want
    for row in rows:
        assert set(row) == {field.name for field in fields(BlockCost)}
        numbers = {name: row[name] for name in row if name.endswith(("_ms", "_bytes", "ratio"))}
        assert all(number > 0 for name, number in numbers.items() if name not in ("step_ms", "state_bytes"))
    printed = capsys.readouterr().out.splitlines()
    assert f"torch {torch.__version__}" in printed[0]
    assert sum(line.split()[:1] == [name] for line in printed for name in BLOCKS) == len(want)


def test_bench_measures_only_the_blocks_that_were_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "cosine_sim", "--lengths", "5", *TINY_OPTIONS]) == 0
    out = capsys.readouterr().out
    assert out.count("cosine_sim") == len(PHASES)
    assert "full" not in out


def test_json_of_decoding_has_every_field(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(decoding, "NEW", 8)
    file = tmp_path / "decode.json"
    assert main(["bench", "--decode", "--json", str(file), *TINY_OPTIONS]) == 0
    (row,) = json.loads(file.read_text())["decoding"]
    assert set(row) == {field.name for field in fields(Decoding)}
    assert row["block"] == "full"
    assert row["new"] == 8
    assert all(row[name] > 0 for name in ("tokens_per_second", "early_ms", "late_ms", "ratio"))
    assert "tokens/s" in capsys.readouterr().out


def test_an_unknown_block_is_refused_in_one_line_that_proposes_the_nearest(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["bench", "cosine_sin"]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert "did you mean 'cosine_sim'?" in err


@pytest.mark.parametrize(
    ("option", "name"),
    [
        (["--lengths", "4", "0"], "lengths"),
        (["--runs", "0"], "runs"),
        (["--threads", "-1"], "threads"),
        (["--dim-head", "0"], "dim_head"),
        (["--dtype", "float8"], "dtype"),
        (["--device", "tpu9"], "device"),
        (["--device", "meta"], "device"),
        (["--device", "cuda:99"], "device"),
        (["--json", "no/such/folder/file.json"], "json"),
    ],
)
def test_an_option_out_of_range_is_refused_before_anything_is_measured(
    option: list[str], name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", *option]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert err.startswith(f"attention-zoo bench: {name} must ")


def test_a_block_that_needs_a_context_cannot_be_decoded_alone(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "--decode", "cross", *TINY_OPTIONS]) == 2
    assert "context" in capsys.readouterr().err


def test_every_command_has_help(capsys: pytest.CaptureFixture[str]) -> None:
    for argv in ([], *([name] for name in COMMANDS)):
        with pytest.raises(SystemExit) as stop:
            main([*argv, "--help"])
        assert stop.value.code == 0
    assert capsys.readouterr().out.count("usage: attention-zoo") == 1 + len(COMMANDS)


def test_the_module_runs_and_ends_quietly_when_nobody_reads_on() -> None:
    command = [sys.executable, "-m", "attention_zoo", "list"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.split("\n\n")[0].count("\n") == len(BLOCKS)
    reading, writing = os.pipe()
    os.close(reading)
    cut = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE, text=True)
    os.close(writing)
    assert (cut.returncode, cut.stderr) == (1, "")


def test_an_allocation_of_ten_megabytes_is_a_peak_of_ten_megabytes() -> None:
    peak = peak_bytes(lambda: torch.zeros(10 * MB, dtype=torch.uint8), CPU)
    assert peak == pytest.approx(10 * MB, rel=0.01)


def test_memory_that_is_released_is_counted_only_while_it_lives() -> None:
    def in_turn() -> None:
        for _ in range(3):
            torch.zeros(10 * MB, dtype=torch.uint8)

    def together() -> list[Tensor]:
        return [torch.zeros(10 * MB, dtype=torch.uint8) for _ in range(3)]

    assert peak_bytes(in_turn, CPU) == pytest.approx(10 * MB, rel=0.01)
    assert peak_bytes(together, CPU) == pytest.approx(30 * MB, rel=0.01)


def test_temporaries_inside_an_operator_and_in_the_backward_pass_are_counted() -> None:
    x = torch.randn(MB, requires_grad=True)  # 4 MB, there before and therefore not counted

    def step() -> tuple[Tensor, ...]:
        y = x.exp()  # 4 MB, kept for the backward pass, which adds the gradients of y and of x
        return torch.autograd.grad(y, x, torch.ones_like(y))

    assert peak_bytes(step, CPU) == pytest.approx(12 * MB, rel=0.01)


def test_the_mixing_of_cosine_sim_normalises_raw_heads() -> None:
    block = CosineSimAttention(16, heads=2, dim_head=8)
    part = mixing(block, 6, TINY)
    q, k, v = part.inputs
    assert torch.allclose(part.run(q, k, v), part.run(5 * q, 3 * k, v), atol=1e-6)
    assert part.causal
    assert not part.whole


def test_the_mixing_of_full_attention_is_sdpa() -> None:
    part = mixing(FullAttention(16, heads=2, dim_head=8), 6, TINY)
    want = torch.nn.functional.scaled_dot_product_attention(*part.inputs, is_causal=True)
    assert torch.equal(part.run(*part.inputs), want)


@pytest.mark.parametrize("phase", PHASES)
def test_a_block_of_an_unknown_kind_is_compared_whole(phase: str) -> None:
    cost = measure_block("averaging", Averaging(16), 6, phase, TINY)
    assert cost.whole
    assert cost.block_ms == cost.mixing_ms
    assert cost.ratio > 0


def test_a_ratio_taken_from_a_whole_block_is_marked(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(BLOCKS, "averaging", Averaging)
    assert main(["bench", "averaging", "full", "--lengths", "6", *TINY_OPTIONS]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert all("*" in line for line in lines if line.startswith("averaging"))
    assert all("*" not in line for line in lines if line.startswith("full"))
    assert lines[-1].startswith("* the whole block")


def test_times_and_ratios_are_positive() -> None:
    assert seconds(lambda: sum(range(1000)), CPU) > 0
    assert all(value > 0 for value in compare(lambda: sum(range(1000)), lambda: sum(range(1000)), CPU, 3))


def test_the_number_of_threads_is_put_back() -> None:
    before = torch.get_num_threads()
    with threads(before + 1):
        assert torch.get_num_threads() == before + 1
    assert torch.get_num_threads() == before


def test_numbers_have_three_significant_digits_and_no_exponent() -> None:
    assert [format_number(number) for number in (7, 0.1234, 9.876, 12.34, 123456.7)] == [
        "7",
        "0.12",
        "9.88",
        "12.3",
        "123457",
    ]
    assert format_row(["full", 5, 1.5], ["<6", ">4", ">6"]) == "full       5    1.50"


def test_bench_shows_what_memory_over_segments_costs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("attention_zoo.cli._bench.memory.LENGTH", 16)
    monkeypatch.setattr("attention_zoo.cli._bench.memory.SLOTS", 4)
    monkeypatch.setattr("attention_zoo.cli._bench.memory.SEGMENT", 64)
    monkeypatch.setattr("attention_zoo.cli._bench.memory.SEGMENTS", (2, 6))
    monkeypatch.setattr("attention_zoo.cli._bench.memory.DEPTHS", (6,))
    file = tmp_path / "memory.json"
    assert main(["bench", "--memory", "--dim", "16", "--heads", "2", "--runs", "1", "--json", str(file)]) == 0
    rows = json.loads(file.read_text())["memory"]
    assert [row["unit"] for row in rows] == ["ms", "ms", "MiB", "MiB", "MiB"]
    assert all(row["ours"] > 0 for row in rows)
    two, six, layers = rows[2:]
    assert six["ours"] < 1.2 * two["ours"]  # the activations of one segment, however many there are
    assert six["beside"] > 2 * two["beside"]
    assert layers["beside"] > 1.5 * layers["ours"]
    assert "replay of 6 segments, beside full" in capsys.readouterr().out


def test_bench_shows_what_recurrences_cost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("attention_zoo.cli._bench.recurrence.SIZES", ((2, 9), (1, 20)))
    file = tmp_path / "recurrence.json"
    assert main(["bench", "--recurrence", "--dim", "8", "--runs", "1", "--json", str(file)]) == 0
    rows = json.loads(file.read_text())["recurrences"]
    assert {(row["rows"], row["length"]) for row in rows} == {(2, 9), (1, 20)}
    assert all(row["ours_ms"] > 0 and row["beside_ms"] > 0 and row["ratio"] > 0 for row in rows)
    assert "scan: gate loop, beside a tree" in capsys.readouterr().out


def test_the_tree_that_recurrences_are_held_against_is_right() -> None:
    q, k, v, z = (torch.randn(2, 21, 3, *last, dtype=torch.float64) for last in ((), (), (), (2,)))
    want = channel_gate_loop(q, k, v, z, impl="reference").out
    assert torch.allclose(tree_mixing(q, k, v, z), want, atol=1e-12)


def test_the_state_of_a_recurrence_has_one_size_and_a_cache_grows() -> None:
    found = {name: decoding.measure_decoding(name, TINY) for name in ("gate_loop", "full")}
    assert found["gate_loop"].late_bytes == found["gate_loop"].early_bytes
    assert found["full"].late_bytes > 9 * found["full"].early_bytes


def test_the_bench_writes_a_table_and_a_plot(tmp_path: Path) -> None:
    table, plot = tmp_path / "bench.md", tmp_path / "bench.png"
    options = ["--lengths", "8", "16", "--markdown", str(table), "--plot", str(plot), *TINY_OPTIONS]
    assert main(["bench", "full", "simple_gate_loop", *options]) == 0
    lines = table.read_text().splitlines()
    assert lines[0].endswith("float32, dim 16, batch 1")
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines if line.startswith("| `")]
    assert [row[:2] for row in rows] == [
        [f"`{block}`", length] for block in ("full", "simple_gate_loop") for length in ("8", "16")
    ]
    assert {len(row) for row in rows} == {10}
    assert rows[2][3].endswith("*")
    assert plot.read_bytes().startswith(b"\x89PNG")


def test_the_state_in_the_bench_is_the_block_s_own(tmp_path: Path) -> None:
    file = tmp_path / "bench.json"
    assert main(["bench", "full", "gate_loop", "--lengths", "8", "16", "--json", str(file), *TINY_OPTIONS]) == 0
    rows = [row for row in json.loads(file.read_text())["blocks"] if row["phase"] == "forward"]
    sizes = {(row["block"], row["length"]): row["state_bytes"] for row in rows}
    assert sizes["full", 16] == 2 * sizes["full", 8] == 2 * 16 * 16 * 4
    assert sizes["gate_loop", 16] == sizes["gate_loop", 8]


def test_a_block_of_one_s_own_is_benched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = "from torch import nn\nclass Mine(nn.Linear):\n    def __init__(self, dim): super().__init__(dim, dim)\n"
    (tmp_path / "benched_blocks.py").write_text(code)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    file = tmp_path / "bench.json"
    assert main(["bench", "benched_blocks:Mine", "--lengths", "8", "--json", str(file), *TINY_OPTIONS]) == 0
    row = json.loads(file.read_text())["blocks"][0]
    assert (row["block"], row["whole"], row["step_ms"]) == ("benched_blocks:Mine", True, None)
