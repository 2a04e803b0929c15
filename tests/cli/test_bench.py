"""`attention-zoo bench` in process at tiny sizes: printed table, files and errors. No test asserts a time."""

from __future__ import annotations

import json
from dataclasses import fields, replace
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.nn import functional as F

from attention_zoo.attention import BLOCKS, AttentionBlock, CosineSimAttention
from attention_zoo.cli import main
from attention_zoo.cli._bench.blocks import PHASES, BlockCost, build_block, head_inputs, measure_block, mixing
from attention_zoo.cli._bench.models import ModelCost, make_model
from attention_zoo.cli._bench.packed import PackedCost, describe_documents, document_lengths, make_documents
from attention_zoo.cli._bench.results import draw_costs
from attention_zoo.cli._bench.setup import Setup, describe_machine
from attention_zoo.models import LanguageModel

CPU = torch.device("cpu")
TINY = Setup(dim=16, heads=2, dim_head=8, runs=2, device=CPU, dtype=torch.float32)
TINY_OPTIONS = ["--dim", "16", "--heads", "2", "--dim-head", "8", "--runs", "2"]


class Averaging(AttentionBlock):
    """A layer whose operation cannot run alone."""

    def __init__(self, dim: int) -> None:
        super().__init__(dim, heads=2, dim_head=8)
        self.to_out = nn.Linear(dim, dim)

    def forward(self, x: Tensor, *, mask: Tensor | None = None) -> Tensor:
        return self.to_out(x.cumsum(1) / torch.arange(1, x.shape[1] + 1)[:, None])


@pytest.mark.parametrize("dtype", ["float32", pytest.param("bfloat16", marks=pytest.mark.slow)])
def test_json_has_every_field_of_every_layer_length_and_phase(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], dtype: str
) -> None:
    file = tmp_path / "bench.json"
    assert main(["bench", "--lengths", "4", "9", "--dtype", dtype, "--json", str(file), *TINY_OPTIONS]) == 0
    found = json.loads(file.read_text())
    assert found["machine"] == describe_machine(CPU) | {"threads": 1}
    sizes = {"dim": 16, "heads": 2, "dim_head": 8, "runs": 2, "threads": 1, "batch": 1, "compile": False}
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


def test_bench_measures_only_named_layers(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "cosine_sim", "--lengths", "5", *TINY_OPTIONS]) == 0
    out = capsys.readouterr().out
    assert out.count("cosine_sim") == len(PHASES)
    assert "full" not in out


def test_unknown_layer_is_reported_with_the_closest_name(capsys: pytest.CaptureFixture[str]) -> None:
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
        (["--plot", "no/such/folder/file.png"], "plot"),
    ],
)
def test_invalid_option_is_reported_before_any_measurement(
    option: list[str], name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", *option]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert err.startswith(f"attention-zoo bench: {name} must ")


def test_mixing_of_cosine_sim_includes_the_normalization() -> None:
    block = CosineSimAttention(16, heads=2, dim_head=8)
    part = mixing(block, 6, TINY)
    q, k, v = part.inputs
    assert torch.allclose(part.run(q, k, v), part.run(5 * q, 3 * k, v), atol=1e-6)
    assert part.causal
    assert not part.whole


@pytest.mark.parametrize("name", ["full", "cross", "conv", "axial_row", "axial_col"])
def test_mixing_equals_the_sdpa_it_is_compared_with(name: str) -> None:
    part = mixing(build_block(name, 20, TINY), 20, TINY)
    causal = part.causal and part.mask is None
    want = F.scaled_dot_product_attention(*part.inputs, attn_mask=part.mask, is_causal=causal)
    torch.testing.assert_close(part.run(*part.inputs), want)


def test_each_layer_is_compared_with_the_right_sdpa() -> None:
    parts = {name: mixing(build_block(name, 20, TINY), 20, TINY) for name in BLOCKS}
    assert {name for name, part in parts.items() if part.mask is not None} == {"conv", "axial_row", "axial_col"}
    assert {name for name, part in parts.items() if part.whole} == {"relative_gate", "simple_gate_loop"}
    assert {name for name, part in parts.items() if not part.causal} == {"cross"}


@pytest.mark.parametrize("phase", PHASES)
def test_layer_without_a_separate_operation_is_compared_whole(phase: str) -> None:
    cost = measure_block("averaging", Averaging(16), 6, phase, TINY)
    assert cost.whole
    assert cost.block_ms == cost.mixing_ms
    assert cost.ratio > 0


def test_ratio_of_a_whole_layer_is_marked_with_a_star(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(BLOCKS, "averaging", Averaging)
    assert main(["bench", "averaging", "full", "--lengths", "6", *TINY_OPTIONS]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert all("*" in line for line in lines if line.startswith("averaging"))
    assert all("*" not in line for line in lines if line.startswith("full"))
    assert lines[-1].startswith("* the whole block")


def test_columns_are_aligned_with_long_names_of_user_defined_layers(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(BLOCKS, "a_layer_with_a_rather_long_name", Averaging)
    assert main(["bench", "a_layer_with_a_rather_long_name", "full", "--lengths", "6", *TINY_OPTIONS]) == 0
    header, *lines = [line for line in capsys.readouterr().out.split("\n\n")[1].splitlines() if line]
    for title in ("length", "block ms", "SDPA MiB"):  # aligned to the right
        end = header.index(title) + len(title)
        assert all(line[end - 1] != " " and line[end] == " " for line in lines)


def test_number_of_threads_is_restored() -> None:
    before = torch.get_num_threads()
    assert main(["bench", "full", "--lengths", "4", "--threads", str(before + 1), *TINY_OPTIONS]) == 0
    assert torch.get_num_threads() == before


def test_bench_writes_a_markdown_table_and_a_plot(tmp_path: Path) -> None:
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


def test_lines_of_the_plot_differ_in_colour_and_marker(monkeypatch: pytest.MonkeyPatch) -> None:
    saved: list[Figure] = []
    monkeypatch.setattr(Figure, "savefig", lambda self, *_, **__: saved.append(self))
    cost = measure_block("full", build_block("full", 4, TINY), 4, "training", TINY)
    costs = [replace(cost, block=name, phase=phase) for name in BLOCKS for phase in PHASES]
    draw_costs(costs, "machine", "plot.png")
    lines = saved[0].axes[0].get_lines()[: len(BLOCKS)]
    assert len({to_hex(line.get_color()) for line in lines}) == len(BLOCKS)
    assert len({line.get_marker() for line in lines}) == len(BLOCKS)


def test_state_size_is_that_of_the_layer(tmp_path: Path) -> None:
    file = tmp_path / "bench.json"
    assert main(["bench", "full", "gate_loop", "--lengths", "8", "16", "--json", str(file), *TINY_OPTIONS]) == 0
    rows = [row for row in json.loads(file.read_text())["blocks"] if row["phase"] == "forward"]
    sizes = {(row["block"], row["length"]): row["state_bytes"] for row in rows}
    assert sizes["full", 16] == 2 * sizes["full", 8] == 2 * 16 * 16 * 4
    assert sizes["gate_loop", 16] == sizes["gate_loop", 8]


def test_user_defined_layer_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = "from torch import nn\nclass Mine(nn.Linear):\n    def __init__(self, dim): super().__init__(dim, dim)\n"
    (tmp_path / "benched_blocks.py").write_text(code)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    file = tmp_path / "bench.json"
    assert main(["bench", "benched_blocks:Mine", "--lengths", "8", "--json", str(file), *TINY_OPTIONS]) == 0
    row = json.loads(file.read_text())["blocks"][0]
    assert (row["block"], row["whole"], row["step_ms"]) == ("benched_blocks:Mine", True, None)


class Recording(AttentionBlock):
    """A layer that takes document ids and records its calls."""

    calls: ClassVar[list[dict[str, Tensor | None]]] = []

    def __init__(self, dim: int) -> None:
        super().__init__(dim, heads=2, dim_head=8)
        self.to_out = nn.Linear(dim, dim)

    def forward(self, x: Tensor, *, mask: Tensor | None = None, document_ids: Tensor | None = None) -> Tensor:
        self.calls.append({"x": x.detach(), "mask": mask, "document_ids": document_ids})
        return self.to_out(x)


def test_packed_bench_measures_the_same_documents_in_three_batches(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(BLOCKS, "documents", Recording)
    file = tmp_path / "bench.json"
    options = ["--packed", "--lengths", "64", "128", "--documents", "5", "--json", str(file), *TINY_OPTIONS]
    assert main(["bench", "documents", *options]) == 0
    rows = json.loads(file.read_text())["packed"]
    assert [(row["block"], row["length"], row["phase"]) for row in rows] == [
        ("documents", length, phase) for length in (64, 128) for phase in PHASES
    ]
    for row in rows:
        assert set(row) == {field.name for field in fields(PackedCost)}
        for way in ("packed", "padded", "separate"):
            assert row[f"{way}_tokens_per_second"] == pytest.approx(row["tokens"] / row[f"{way}_ms"] * 1000)
    printed = capsys.readouterr().out.splitlines()
    assert sum(line.startswith("documents") for line in printed) == len(rows)
    assert sum("documents of" in line for line in printed) == 2
    calls = [call for call in Recording.calls if call["x"].shape[-1] == 16 and call["x"].shape[1] > 4]
    packed = [call for call in calls if call["document_ids"] is not None]
    padded = [call for call in calls if call["document_ids"] is None and call["mask"] is not None]
    separate = [call for call in calls if call["mask"] is None]
    assert packed
    assert padded
    for length in (64, 128):
        sizes = document_lengths([length], 5)[length]
        assert max(sizes) == length
        assert {call["x"].shape[1] for call in packed} == {64, 128}
        assert sum(sizes) in {int(call["mask"].sum()) for call in packed}
        assert sum(sizes) in {int(call["mask"].sum()) for call in padded}
        assert set(sizes) <= {call["x"].shape[1] for call in separate}


def test_documents_of_the_three_batches_have_the_same_features() -> None:
    documents = make_documents([3, 5, 8, 1], 8, TINY)
    assert documents.packed.shape == (3, 8, 16)
    assert documents.padded.shape == (4, 8, 16)
    for index, separate in enumerate(documents.separate):
        assert torch.equal(documents.packed[documents.ids == index], separate[0])
        assert torch.equal(documents.padded[index][documents.padded_mask[index]], separate[0])


def test_document_lengths_are_ascending_and_cut_to_the_row() -> None:
    lengths = document_lengths([64, 1024], 12)
    assert lengths[64] == [min(64, size) for size in lengths[1024]]
    assert lengths[1024] == sorted(lengths[1024])
    assert 1 <= lengths[1024][0] < lengths[1024][-1] == 1024
    assert describe_documents(8, [3, 5, 8, 2]) == (
        "4 documents of 2 to 8 tokens, 18 in total: 3 packed rows of 8, 75% full; padded rows 56% full"
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--documents", "0"], "documents must be at least 1"),
        (["--lengths", "1"], "lengths must be at least 2"),
        (["--plot", "file.png"], "plot must be omitted with --packed, got plot='file.png'"),
        (["cross"], "blocks must take document_ids and no context with --packed, got cross"),
        (["conv"], "blocks must take document_ids and no context with --packed, got conv"),
        (["--batch", "2"], "batch and compile must be omitted with --packed"),
        (["--model"], "packed must be omitted with --model"),
    ],
)
def test_invalid_option_of_packed_bench_is_reported_before_any_measurement(
    options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", "--packed", *options]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert message in err


def test_model_bench_compares_training_with_full_attention(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shapes: list[tuple[int, ...]] = []
    loss = LanguageModel.loss
    monkeypatch.setattr(
        LanguageModel, "loss", lambda self, tokens: (shapes.append(tokens.shape), loss(self, tokens))[1]
    )
    file = tmp_path / "bench.json"
    options = ["--batch", "3", "--lengths", "9", "--depth", "1", "--num-tokens", "20", "--dtype", "bfloat16"]
    assert main(["bench", "gate_loop", "--model", *options, "--json", str(file), *TINY_OPTIONS]) == 0
    (row,) = json.loads(file.read_text())["models"]
    assert set(row) == {field.name for field in fields(ModelCost)}
    assert set(shapes) == {(3, 9)}
    assert row["tokens_per_second"] == pytest.approx(27 / row["step_ms"] * 1000)
    assert row["full_tokens_per_second"] == pytest.approx(27 / row["full_ms"] * 1000)
    assert row["parameters"] == sum(p.numel() for p in make_model("gate_loop", 1, 20, TINY).parameters())
    assert capsys.readouterr().out.splitlines()[-1].split()[0] == "gate_loop"


@pytest.mark.parametrize("name", ["conv", "cross"])
def test_model_bench_names_layers_that_a_language_model_does_not_take(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", name, "--model"]) == 2
    assert f"with --model, got {name}" in capsys.readouterr().err


def test_batch_size_multiplies_the_tokens_of_a_second(tmp_path: Path) -> None:
    file = tmp_path / "bench.json"
    assert main(["bench", "full", "--batch", "5", "--lengths", "7", "--json", str(file), *TINY_OPTIONS]) == 0
    for row in json.loads(file.read_text())["blocks"]:
        assert row["tokens_per_second"] == pytest.approx(35 / row["block_ms"] * 1000)
    assert [tuple(q.shape) for q in head_inputs(7, replace(TINY, batch=5))] == [(5, 2, 7, 8)] * 3


@pytest.mark.slow
def test_bench_compiles_layers_and_models(tmp_path: Path) -> None:
    assert main(["bench", "full", "--compile", "--lengths", "8", *TINY_OPTIONS]) == 0
    assert main(["bench", "full", "--model", "--compile", "--lengths", "8", "--depth", "1", *TINY_OPTIONS]) == 0
