"""Every example runs for a few steps and writes its files; training resumes exactly."""

from __future__ import annotations

import importlib.util
import os
import re
import signal
import subprocess
import sys
from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import pytest
import torch
from matplotlib.figure import Figure

from attention_zoo import Encoder, LanguageModel, Memformer, TextToImageTransformer
from attention_zoo.training import read_checkpoint, read_sharded

EXAMPLES = Path(__file__).parents[2] / "examples"
TIMEOUT = 300  # seconds, enough for a busy machine
TINY = ["--dim", "16", "--depth", "2", "--heads", "2", "--seq-len", "16", "--batch", "2"]


@dataclass(frozen=True)
class Example:
    """An example and the options of a small run.

    Args:
        script: file name.
        options: options of a small run, other than `--data` and `--out`.
        files: files written to the folder of `--out`.
        load: reads the saved model.
    """

    script: str
    options: tuple[str, ...]
    files: tuple[str, ...]
    load: Callable[[Path], torch.nn.Module]


CASES = [
    Example(
        "train_language_model.py",
        (*TINY, "--attention", "full,cosine_sim", "--card"),
        ("README.md", "checkpoint.pt", "config.json", "loss.png", "model.safetensors"),
        LanguageModel.load,
    ),
]
PACKED = Example("train_language_model.py", (*TINY, "--packed"), (), LanguageModel.load)
examples = pytest.mark.parametrize("example", CASES, ids=lambda example: example.script)


def command(example: Example, folder: Path, out: str, *options: str) -> list[str]:
    data = folder / "text.txt"
    data.write_text("the quick brown fox jumps over the lazy dog\n" * 100)
    return [sys.executable, str(EXAMPLES / example.script), "--out", str(folder / out), *options]


def environment() -> dict[str, str]:
    # One thread and no compilation: the tensors are tiny. Unbuffered: a test waits for output.
    settings = {"OMP_NUM_THREADS": "1", "NUMBA_DISABLE_JIT": "1", "PYTHONUNBUFFERED": "1", "PYTHONIOENCODING": "utf-8"}
    return {**os.environ, **settings}


def run(call: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(call, env=environment(), capture_output=True, encoding="utf-8", timeout=TIMEOUT, check=False)


@pytest.mark.slow
@examples
def test_training_example_writes_its_files(example: Example, tmp_path: Path) -> None:
    fresh = ["--data", str(tmp_path / "text.txt"), "--device", "cpu", "--steps", "6", *example.options]
    done = run(command(example, tmp_path, "out", *fresh))
    assert done.returncode == 0, done.stderr
    steps = re.findall(r"^step (\d+): [\d.]+ bits per byte of validation text$", done.stdout, re.M)
    assert steps == ["1", "2", "3", "4", "5", "6"]  # each evaluated once
    assert done.stdout.count("  sample: ") == 5
    assert [line.partition(",")[0] for line in done.stderr.splitlines()] == [f"step {step}/6" for step in range(1, 7)]
    assert tuple(sorted(path.name for path in (tmp_path / "out").iterdir())) == example.files
    assert (tmp_path / "out" / "loss.png").read_bytes().startswith(b"\x89PNG")
    saved, loaded = read_checkpoint(tmp_path / "out" / "checkpoint.pt"), example.load(tmp_path / "out")
    assert saved.step == 6
    assert all(torch.equal(tensor, loaded.state_dict()[name]) for name, tensor in saved.contents["model"].items())


@pytest.mark.slow
def test_second_run_in_the_same_folder_is_refused_unless_it_resumes_or_overwrites(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()  # an empty folder holds no run
    fresh = ["--data", str(tmp_path / "text.txt"), "--device", "cpu", "--steps", "2", *TINY]
    assert run(command(CASES[0], tmp_path, "out", *fresh)).returncode == 0
    before = (tmp_path / "out" / "checkpoint.pt").read_bytes()
    done = run(command(CASES[0], tmp_path, "out", *fresh))
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].endswith(
        f"error: {tmp_path / 'out'} holds a run: continue it with --resume, or replace it with --overwrite"
    )
    assert (tmp_path / "out" / "checkpoint.pt").read_bytes() == before
    resumed = run(command(CASES[0], tmp_path, "out", "--resume", "--device", "cpu"))
    assert "\nresuming at step 2\n" in resumed.stdout
    again = run(command(CASES[0], tmp_path, "out", *fresh, "--steps", "3", "--overwrite"))
    assert again.returncode == 0, again.stderr
    assert read_checkpoint(tmp_path / "out" / "checkpoint.pt").step == 3


@pytest.mark.parametrize("script", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.name)
def test_every_example_has_an_option_for_threads_and_tells_when_steps_are_slow(script: Path) -> None:
    source = script.read_text()
    assert "training.parse_options(parser)" in source
    assert "training.Progress(" in source
    assert "tqdm" not in source


def example_module(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """The figures that are saved during a test."""
    saved: list[Figure] = []
    monkeypatch.setattr(Figure, "savefig", lambda self, *_, **__: saved.append(self))
    return saved


def test_error_bars_of_accuracies_end_at_100_percent(figures: list[Figure]) -> None:
    results = {"full": {"task": [{"score": score} for score in (1.0, 1.0, 0.7)]}}
    example_module("compare_blocks").plot(results, {}, Path("arena.png"))
    (bars,) = figures[0].axes[1].containers[-1:]
    low, high = bars.errorbar.lines[2][0].get_segments()[0][:, 1]
    assert high == pytest.approx(100)
    assert low == pytest.approx(90 - 10 * 3**0.5)  # mean - standard deviation


def test_maps_of_streams_have_axis_titles_and_colour_bars(figures: list[Figure]) -> None:
    module = example_module("multi_stream")
    options = Namespace(dim=16, depth=2, heads=2, seq_len=16, steps=7)
    module.draw(module.build(2, options), options, Path("heads.png"))
    *maps, first_bar, second_bar = figures[0].axes
    assert {axes.get_xlabel() for axes in maps} == {"key (byte)"}
    assert [axes.get_ylabel() for axes in maps[::4]] == ["after the softmax\nquery (byte)", "mixed\nquery (byte)"]
    assert maps[0].images[0].get_cmap().name == "viridis"  # weights after the softmax are positive
    assert all(bar.get_ylabel().startswith("weight") for bar in (first_bar, second_bar))
    assert "after 7 steps" in figures[0].get_suptitle()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("script", "options", "message"),
    [
        ("multi_stream.py", ["--steps", "0"], "--steps must be at least 1, got 0"),
        ("multi_stream.py", ["--data", "nowhere"], "nowhere does not exist"),
        ("train_with_accelerate.py", ["--attention", "ful"], "did you mean 'full'"),
        ("classify_digits.py", ["--attention", "ful"], "did you mean 'full'"),
        ("gate_loop_long_context.py", ["--data", "nowhere"], "nowhere does not exist"),
        ("compare_blocks.py", ["--data", "nowhere"], "nowhere does not exist"),
        ("compose_by_hand.py", ["--threads", "0"], "--threads must be at least 1, got 0"),
    ],
)
def test_mistakes_are_reported_in_one_sentence(script: str, options: list[str], message: str) -> None:
    done = run([sys.executable, str(EXAMPLES / script), *options])
    assert done.returncode != 0
    assert message in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_model_card_states_data_score_and_command(tmp_path: Path) -> None:
    fresh = ["--data", str(tmp_path / "text.txt"), "--device", "cpu", "--steps", "2", *TINY, "--card"]
    done = run(command(CASES[0], tmp_path, "out", *fresh))
    bits = re.findall(r"step 2: ([\d.]+) bits per byte", done.stdout)[-1]
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"{bits} bits per byte of validation text; byte frequencies need" in card
    assert f"3,960 bytes of {tmp_path / 'text.txt'}" in card
    assert f"python {EXAMPLES / 'train_language_model.py'} --out" in card
    assert run(command(CASES[0], tmp_path, "out", *fresh, "--depth", "1", "--overwrite")).returncode == 0
    assert '"depth": 1' in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("update", ["gru", "paper"])
def test_recall_example_writes_model_and_plot(update: str, tmp_path: Path) -> None:
    options = [
        "--memory-update",
        update,
        "--steps",
        "6",
        "--dim",
        "16",
        "--batch",
        "2",
        "--device",
        "cpu",
        "--out",
        str(tmp_path),
    ]
    done = run([sys.executable, str(EXAMPLES / "recall_across_segments.py"), *options])
    assert done.returncode == 0, done.stderr
    assert "chance 6.2%" in done.stdout
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "model.safetensors", "recall.png"]
    assert (tmp_path / "recall.png").read_bytes().startswith(b"\x89PNG")
    Memformer.load(tmp_path)


@pytest.mark.slow
def test_digits_example_generates_and_classifies(tmp_path: Path) -> None:
    options = ["--steps", "3", "--dim", "16", "--heads", "2", "--batch", "4", "--samples", "2", "--device", "cpu"]
    # a warning of torch about the conversion of a loss is an error
    done = run(
        [
            sys.executable,
            "-W",
            "error:Converting a tensor",
            str(EXAMPLES / "draw_digits.py"),
            *options,
            "--out",
            str(tmp_path),
        ]
    )
    assert done.returncode == 0, done.stderr
    assert "of 20 generated digits" in done.stdout
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "digits.png", "model.safetensors"]
    assert (tmp_path / "digits.png").read_bytes().startswith(b"\x89PNG")
    assert TextToImageTransformer.load(tmp_path).num_image_tokens == 17


@pytest.mark.slow
def test_comparison_example_continues_an_interrupted_run(tmp_path: Path) -> None:
    call = command(Example("compare_blocks.py", (), (), LanguageModel.load), tmp_path, "out", "--steps", "2")
    call += ["--quick", "--seeds", "2", "--blocks", "full,simple_gate_loop + full"]
    call += ["--data", str(tmp_path / "text.txt")]
    first = run(call)
    assert first.returncode == 0, first.stderr
    table = (tmp_path / "out" / "compare_blocks.md").read_text()
    assert table in first.stdout + "\n"
    assert table.startswith(
        "| blocks | bits per byte | associative recall, % | selective copying, % | recall across segm"
    )
    assert len(table.splitlines()) == 4
    assert (tmp_path / "out" / "compare_blocks.png").read_bytes().startswith(b"\x89PNG")
    cells = {path: path.stat().st_mtime_ns for path in (tmp_path / "out" / "cells").iterdir()}
    assert len(cells) == 2 * 2 * 4
    lost = sorted(cells)[3]
    content = lost.read_text()
    lost.unlink()
    again = run(call)
    assert again.returncode == 0, again.stderr
    assert {path for path in cells if path.stat().st_mtime_ns != cells[path]} == {lost}
    assert lost.read_text() == content


@pytest.mark.slow
def test_streams_example_scores_both_models_and_writes_a_plot(tmp_path: Path) -> None:
    call = command(Example("multi_stream.py", (), (), LanguageModel.load), tmp_path, "out", *TINY, "--steps", "3")
    done = run([*call, "--data", str(tmp_path / "text.txt")])
    assert done.returncode == 0, done.stderr
    assert "1 stream: " in done.stdout
    assert "2 streams: " in done.stdout
    assert (tmp_path / "out" / "heads.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_accelerate_example_trains_an_unmodified_model(tmp_path: Path) -> None:
    call = command(Example("train_with_accelerate.py", (), (), LanguageModel.load), tmp_path, "out", "--cpu")
    sizes = ["--dim", "32", "--depth", "2", "--seq-len", "16", "--steps", "60", "--threads", "1"]
    done = run([*call, "--data", str(tmp_path / "text.txt"), *sizes])
    assert done.returncode == 0, done.stderr
    before, after = (
        float(line.split()[1]) for line in done.stdout.splitlines() if line.startswith(("before:", "after:"))
    )
    assert before > 7
    assert after < 4  # the text repeats one sentence
    assert LanguageModel.load(tmp_path / "out").arguments["dim"] == 32


@pytest.mark.slow
def test_composed_example_trains_and_prints_the_contract_checks() -> None:
    done = run([sys.executable, str(EXAMPLES / "compose_by_hand.py"), "--steps", "50"])
    assert done.returncode == 0, done.stderr
    assert "step 50: loss" in done.stdout
    assert "causality: passed" in done.stdout
    assert "arguments: failed" in done.stdout


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="Windows cannot send Ctrl-C to one process")
@pytest.mark.parametrize("example", [*CASES, PACKED], ids=["random parts", "packed files"])
def test_resumed_training_equals_uninterrupted_training(example: Example, tmp_path: Path) -> None:
    fresh = ["--data", str(tmp_path / "text.txt"), "--device", "cpu", "--steps", "300", *example.options]
    uninterrupted = subprocess.Popen(
        command(example, tmp_path, "uninterrupted", *fresh), env=environment(), stdout=subprocess.DEVNULL
    )
    call = command(example, tmp_path, "interrupted", *fresh)
    with subprocess.Popen(call, env=environment(), stdout=subprocess.PIPE, encoding="utf-8") as process:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("step "):
                process.send_signal(signal.SIGINT)
                break
        rest = process.stdout.read()
    assert process.returncode == 0, rest
    assert "--resume --out" in rest
    stopped = read_checkpoint(tmp_path / "interrupted" / "checkpoint.pt").step
    assert 0 < stopped < 300
    done = run(command(example, tmp_path, "interrupted", "--resume", "--device", "cpu"))
    assert done.returncode == 0, done.stderr
    assert uninterrupted.wait(TIMEOUT) == 0
    want, got = (read_checkpoint(tmp_path / out / "checkpoint.pt") for out in ("uninterrupted", "interrupted"))
    assert got.extra["curves"] == want.extra["curves"]
    assert all(torch.equal(tensor, got.contents["model"][name]) for name, tensor in want.contents["model"].items())


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no limit for the size of a file")
@pytest.mark.parametrize("strategy", ["single", "ddp"])
def test_full_disk_is_reported_and_leaves_the_checkpoint_intact(tmp_path: Path, strategy: str) -> None:
    fresh = ["--data", str(tmp_path / "text.txt"), "--device", "cpu", *TINY, "--steps", "3", "--strategy", strategy]
    call = command(CASES[0], tmp_path, "out", *fresh)
    if strategy == "ddp":
        call[1:1] = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    assert run(call).returncode == 0
    call.append("--overwrite")
    # no file may grow beyond 20 KiB, a tenth of a checkpoint
    done = run(["bash", "-c", 'ulimit -f 20 && exec "$@"', "bash", *call])
    assert done.returncode != 0
    assert "The previous checkpoint is intact." in done.stderr
    found = read_checkpoint(tmp_path / "out" / "checkpoint.pt") if strategy == "single" else None
    assert (found or read_sharded(tmp_path / "out" / "checkpoint")).step == 3


@pytest.mark.slow
def test_resume_takes_the_most_recent_checkpoint(tmp_path: Path) -> None:
    fresh = ["--data", str(tmp_path / "text.txt"), "--device", "cpu", *TINY]
    assert run(command(CASES[0], tmp_path, "out", *fresh, "--steps", "9")).returncode == 0
    python, *call = command(CASES[0], tmp_path, "out", *fresh, "--steps", "3", "--strategy", "ddp", "--overwrite")
    assert run([python, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *call]).returncode == 0
    done = run(command(CASES[0], tmp_path, "out", "--resume", "--device", "cpu", "--strategy", "single"))
    assert done.returncode == 0, done.stderr
    assert read_checkpoint(tmp_path / "out" / "checkpoint.pt").step == 3


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="Windows cannot send Ctrl-C to one group of processes")
def test_run_of_two_processes_resumes_in_one_with_the_same_losses(tmp_path: Path) -> None:
    example = CASES[0]
    fresh = ["--data", str(tmp_path / "text.txt"), "--device", "cpu", "--steps", "300", *TINY]
    python, *call = command(example, tmp_path, "two", *fresh, "--strategy", "fsdp")
    call = [python, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *call]
    # Ctrl-C reaches every process of the terminal's group, and torchrun forwards it to its workers once more
    with subprocess.Popen(
        call, env=environment(), stdout=subprocess.PIPE, encoding="utf-8", start_new_session=True
    ) as two:
        assert two.stdout is not None
        for line in two.stdout:
            if line.startswith("step "):
                os.killpg(two.pid, signal.SIGINT)
                break
        rest = two.stdout.read()
    assert "--resume --out" in rest
    stopped = read_sharded(tmp_path / "two" / "checkpoint")
    assert 0 < stopped.step < 300
    done = run(command(example, tmp_path, "two", "--resume", "--device", "cpu", "--strategy", "single"))
    assert done.returncode == 0, done.stderr
    assert run(command(example, tmp_path, "one", *fresh)).returncode == 0
    curves = [read_checkpoint(tmp_path / out / "checkpoint.pt").extra["curves"] for out in ("two", "one")]
    for (step, got), (_, want) in zip(*(curve["training"] for curve in curves), strict=True):
        assert abs(got - want) < (1e-6 if step == 1 else 1e-4 if step <= 20 else 1e-2)


@examples
@pytest.mark.parametrize(
    ("options", "message"),
    [
        pytest.param(
            ["--data", "nowhere"],
            "error: path must be a file or a folder of text, but nowhere does not exist",
            marks=pytest.mark.slow,
        ),
        pytest.param(["--resume"], "checkpoint.pt does not exist", marks=pytest.mark.slow),
        (["--attention", "ful"], "did you mean 'full'?"),
        pytest.param(
            ["--strategy", "ddp"],
            "error: strategy must be 'single' without a process group, got strategy='ddp'",
            marks=pytest.mark.slow,
        ),
    ],
    ids=["no data", "no checkpoint", "unknown block", "no torchrun"],
)
def test_invalid_option_is_reported_without_a_traceback(
    example: Example, options: list[str], message: str, tmp_path: Path
) -> None:
    done = run(command(example, tmp_path, "out", "--data", str(tmp_path / "text.txt"), *options))
    assert done.returncode != 0
    assert message in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_the_classifier_of_digits_saves_an_encoder(tmp_path: Path) -> None:
    done = run([sys.executable, str(EXAMPLES / "classify_digits.py"), "--steps", "60", "--out", str(tmp_path / "out")])
    assert done.returncode == 0, done.stderr
    assert float(re.search(r"unseen digits: ([\d.]+)%", done.stdout)[1]) > 25  # chance is 10 %
    assert Encoder.load(tmp_path / "out").to_logits.out_features == 10


@pytest.mark.slow
def test_long_context_example_prints_both_tables(tmp_path: Path) -> None:
    data = tmp_path / "text.txt"
    data.write_text("the quick brown fox jumps over the lazy dog\n" * 400)
    sizes = ["--dim", "16", "--depth", "1", "--train-len", "16", "--long-len", "64", "--batch", "2", "--steps", "2"]
    done = run([sys.executable, str(EXAMPLES / "gate_loop_long_context.py"), "--data", str(data), *sizes])
    assert done.returncode == 0, done.stderr
    assert "bits per byte by position" in done.stdout
    assert "decoding after n bytes" in done.stdout


# Layers swapped in a trained model.
def run_here(monkeypatch: pytest.MonkeyPatch, module: ModuleType, *options: str) -> None:
    """Run an example in this process."""
    monkeypatch.setattr(sys, "argv", [f"{module.__name__}.py", *options])
    module.main()


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a small model that train_language_model.py has trained for three steps."""
    folder = tmp_path_factory.mktemp("trained")
    (folder / "text.txt").write_text("the quick brown fox jumps over the lazy dog\n" * 100)
    with pytest.MonkeyPatch.context() as patch:
        options = ["--data", str(folder / "text.txt"), "--out", str(folder / "model"), "--steps", "3", *TINY]
        module = example_module("train_language_model")
        module.SAMPLE = module.SHORT_SAMPLE = 8
        run_here(patch, module, "--device", "cpu", *options)
    return folder / "model"


def test_swapped_layers_are_saved_beside_a_table_and_a_plot(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    module = example_module("swap_attention")
    monkeypatch.setattr(module, "LENGTHS", (64, 128))
    monkeypatch.setattr(module, "TIMED", 2)
    both = ["--layers", "1,0", "--steps", "4"]
    run_here(monkeypatch, module, "--model", str(trained), "--out", str(tmp_path), *both)
    printed = capsys.readouterr().out
    assert "layer 0: FullAttention -> GateLoopAttention\n  copied: to_q.weight, to_k.weight, to_v" in printed
    assert "  new: to_a.weight, to_a.bias, norm.weight, norm.bias, to_gate.weight\n" in printed
    assert "layer 1: FullAttention -> WindowAttention" in printed
    lines = re.findall(r"^ +([\d.]+)% +(.+)$", printed, re.M)
    rows = [[float(cell) for cell in (share, *rest.split())] for share, rest in lines]
    assert [row[0] for row in rows] == [0.0, 33.3, 66.7, 100.0, 133.3]  # of three steps
    assert all(len(row) == 5 for row in rows)
    want = read_checkpoint(trained / "checkpoint.pt").extra["curves"]["validation"][-1][1]
    assert rows[0][2] == pytest.approx(want, abs=1e-3)  # unchanged, before the first step
    full, half = 2 * 2 * 16 * 4 / 1024, (2 * 16 * 8 + 2 * (31 + 4) * 16) * 4 / 1024  # KiB per token, and in total
    sizes = re.findall(r"^ +(\d+) +([\d,]+) KiB +[\d.]+ ms +([\d,]+) KiB", printed, re.M)
    assert sizes == [(str(n), f"{n * full:.0f}", f"{half:.0f}") for n in (64, 128)]
    assert (tmp_path / "swap.png").read_bytes().startswith(b"\x89PNG")
    blocks = [layer.sublayers[0].block for layer in LanguageModel.load(tmp_path).stack.layers]
    assert [type(block).__name__ for block in blocks] == ["GateLoopAttention", "WindowAttention"]


def test_differences_of_swapped_layers_are_relative_to_the_frozen_old_ones(trained: Path) -> None:
    module = example_module("swap_attention")
    original, model = LanguageModel.load(trained).requires_grad_(False), LanguageModel.load(trained)
    (found,) = module.swap(model, original, Namespace(attention="gate_loop", layers=None))
    old, new = (part.stack.layers[0].sublayers[0].block for part in (original, model))
    x = torch.randn(2, 9, 16)
    got, want = new(x), old(x)
    assert found.layer == 0
    torch.testing.assert_close(found.value, (got - want).pow(2).sum() / want.pow(2).sum())
    found.value.backward()
    assert all(weight.grad is not None for weight in new.parameters())
    assert torch.equal(new.to_k.weight, old.to_qkv.part("k") if hasattr(old, "to_qkv") else old.to_k.weight)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--model", "nowhere"], "error: nowhere/model.safetensors does not exist"),
        (["--model", "ENCODER"], "field 'class' must be 'LanguageModel', got 'Encoder'"),
        (["--steps", "0"], "error: --steps must be at least 1, got 0"),
        (["--attention", "gate_lop"], "did you mean 'gate_loop'?"),
        (["--layers", "2"], "layer must be below 2, got layer=2"),
        (["--layers", "-1"], "error: layer must be at least 0, got layer=-1"),
        (["--layers", "first"], "argument --layers: invalid indices value: 'first'"),
        (["--match", "nan"], "error: --match must be at least 0, got nan"),
        (["--data", "nowhere"], "nowhere does not exist"),
    ],
    ids=lambda part: " ".join(part) if isinstance(part, list) else "",
)
def test_models_and_layers_that_cannot_be_swapped_are_refused(
    options: list[str],
    message: str,
    trained: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    Encoder(num_tokens=256, dim=16, depth=1, num_classes=3, heads=2, dim_head=8).save(tmp_path)
    options = [str(tmp_path) if part == "ENCODER" else part for part in options]
    with pytest.raises(SystemExit) as stop:
        run_here(monkeypatch, example_module("swap_attention"), "--model", str(trained), *options)
    assert message in f"{capsys.readouterr().err} {stop.value.code}"
