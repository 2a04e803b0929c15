"""Everything that needs a GPU, in parts of less than ten minutes; each writes its part of a report.

    python -m benchmarks.gpu                  # list the parts
    python -m benchmarks.gpu contract-1 contract-2
    python -m benchmarks.gpu all              # every part, one after the other
    python -m benchmarks.gpu report           # join the parts to docs/gpu.md

Parts are written to --out as Markdown. A part that fails is written with its error; the others still run. Run it from a
checkout with the extra `test`: the contract checks are those of tests/cases.py.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import subprocess
import sys
from collections.abc import Callable, Sequence
from functools import partial
from itertools import product
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, nn

from attention_zoo._checks import check_choice
from attention_zoo._files import write_aside
from attention_zoo.attention import BLOCKS
from attention_zoo.cli import main as command
from attention_zoo.cli._bench.blocks import block_inputs, build_block, head_inputs, timed_call
from attention_zoo.cli._bench.measure import compare
from attention_zoo.cli._bench.setup import Setup, check_device, describe_machine, format_machine
from attention_zoo.ops import gate_loop, prefer, reference, unit_gate
from attention_zoo.testing import CHECKS, run_check
from attention_zoo.testing.report import FAILED
from attention_zoo.testing.subject import seeded
from benchmarks.__main__ import main as studies

ROOT = Path(__file__).parents[1]
SHARES = 4  # parts of the contract checks
LENGTHS = {"short": ("1024", "2048", "4096"), "long": ("8192", "16384")}
SIZES = (300, 4096)  # tokens of the comparison of implementations; with the first all are compared to the reference
FLEX = ("conv", "axial_row", "axial_col", "block_sparse")
TRAINING = ["full", "gate_loop", "gate_loop+full"]
# a model of 124 million parameters, as GPT-2
GPT2 = ["--dim", "768", "--heads", "12", "--depth", "12", "--num-tokens", "50304", "--lengths", "1024", "--batch", "8"]
# Training time over that of SDPA with flash attention at 4,096 tokens in bfloat16 that a layer should not exceed.
BOUNDS = {
    "cosine_sim": 1.1,
    "conv": 0.35,
    "axial_row": 0.35,
    "axial_col": 0.35,
    "block_sparse": 0.4,
    "gate_loop": 1.2,
    "talking_heads": 5.0,
}


def contract(share: int, device: str) -> str:
    """Every contract check on a share of the rows of tests/cases.py, in float32 and half precision."""
    from tests.cases import CASES

    cases = CASES[share::SHARES]
    passed, failures = 0, []
    for case in cases:
        for name in CHECKS:
            if name == "compile" and ":" in case.name:  # variants are compiled on the CPU only
                continue
            outcome = run_check(name, case.subject(strict=True, effort="quick", device=device))
            print(f"{case.name}: {outcome.check} {outcome.status} {outcome.message}", flush=True)
            passed += outcome.status != FAILED
            if outcome.status == FAILED:
                failures.append(f"- {case.name}, {outcome.check}: {outcome.message}")
    title = f"{len(cases)} rows of tests/cases.py: {passed} checks without a failure, {len(failures)} with one."
    return "\n".join([title, *([""] if failures else []), *failures])


def cuda_tests(device: str) -> str:
    """The tests marked `cuda`."""
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-m", "cuda", "-p", "no:cacheprovider"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    lines = [line for line in run.stdout.splitlines() if line.startswith(("FAILED", "ERROR")) or " in " in line]
    return as_code(lines[-40:])


def implementations(device: str) -> str:
    """Opt-in implementations beside the default, forward and backward: error against the reference, and time."""
    lines = []
    for length, dtype in product(SIZES, (torch.float32, torch.bfloat16)):
        setup = Setup(512, 8, 64, 7, torch.device(device), dtype)
        for name in FLEX:
            block = build_block(name, length, setup)
            found = beside(block, prefer("flex")(block.forward), block_inputs(block, length, setup), setup, block)
            lines.append(f"- {name}, {length} tokens, {dtype}: flex {found}")
        run = partial(loop, gate=unit_gate(setup.randn(1, length, 8, 2)).transpose(1, 2))
        found = beside(run, partial(run, impl="fla"), head_inputs(length, setup), setup)
        lines.append(f"- gate_loop, {length} tokens, {dtype}: fla {found}")
    return "\n".join(lines)


def loop(q: Tensor, k: Tensor, v: Tensor, *, gate: Tensor, impl: str = "auto") -> Tensor:
    """The output of the gate loop."""
    return gate_loop(q, k, v, gate, impl=impl).out


def beside(
    run: Callable[..., Tensor],
    other: Callable[..., Tensor],
    inputs: Sequence[Tensor],
    setup: Setup,
    block: nn.Module | None = None,
) -> str:
    """The time of `other` over that of `run`, and the largest relative errors of their gradients."""
    try:
        with seeded(0):  # the gradient of the output is random
            other_call = timed_call("training", other, inputs, block)
        with seeded(0):
            call = timed_call("training", run, inputs, block)
        ratio = compare(other_call, call, setup.device, setup.runs)[2]
        if inputs[0].shape[-2] > min(SIZES):  # the reference takes too much memory
            return f"takes {ratio:.2f} times as long"
        with reference():
            want: Any = call()
        errors = [
            max(float((a - b).norm() / b.norm()) for a, b in zip(got, want, strict=True) if b is not None and b.norm())
            for got in (other_call(), call())  # type: ignore[arg-type]
        ]
        return f"takes {ratio:.2f} times as long, error {errors[0]:.1g}, by default {errors[1]:.1g}"
    except Exception as error:  # part of the report
        return f"{type(error).__name__}: {error}"


def bench(which: str, device: str) -> str:
    """Layers beside SDPA in bfloat16, forward and training."""
    command_line = ["bench", "--device", device, "--dtype", "bfloat16", "--lengths", *LENGTHS[which]]
    names = [name for name in BLOCKS if name != "relative_gate" or which == "short"]  # its scores are explicit
    printed = capture(command, [command_line[0], *names, *command_line[1:]])
    rows = [line.split() for line in printed]
    found = {row[0]: float(row[6].rstrip("*")) for row in rows if row[1:3] == ["4096", "training"]}
    bounds = [
        f"- {name}: {found[name]:.2f} times SDPA, to hold against {bound}"
        for name, bound in BOUNDS.items()
        if name in found
    ]
    return "\n".join([as_code(printed), *(["", "Training at 4,096 tokens:", "", *bounds] if bounds else [])])


def training(device: str) -> str:
    """Training steps of models of 124 million parameters, compiled, in bfloat16."""
    options = ["--model", *GPT2, "--device", device, "--dtype", "bfloat16", "--compile"]
    return as_code(capture(command, ["bench", *TRAINING, *options]))


def decoding(device: str) -> str:
    """Decoding with language models, in bfloat16."""
    names = [name for name in BLOCKS if name != "cross"]
    options = ["--device", device, "--dtype", "bfloat16", "--blocks", *names]
    return as_code(capture(studies, ["decode", *options]))


def capture(run: Callable[[Sequence[str]], int], arguments: Sequence[str]) -> list[str]:
    """The lines that a command prints, which are shown as well.

    Raises:
        RuntimeError: the command fails.
    """
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        status = run(arguments)
    print(printed.getvalue(), flush=True)
    if status:
        raise RuntimeError(f"exit status {status} of {' '.join(arguments)}")
    return printed.getvalue().strip().splitlines()


def as_code(lines: Sequence[str]) -> str:
    """A Markdown code block."""
    return "\n".join(["```", *lines, "```"])


# Name of each part: its function, and the arguments before the device.
PARTS: dict[str, tuple[Callable[..., str], tuple[object, ...]]] = {
    **{f"contract-{share + 1}": (contract, (share,)) for share in range(SHARES)},
    "tests": (cuda_tests, ()),
    **{f"bench-{which}": (bench, (which,)) for which in LENGTHS},
    "implementations": (implementations, ()),
    "training": (training, ()),
    "decoding": (decoding, ()),
}


def describe(device: str) -> str:
    """GPU, driver, processor and torch version in one line."""
    machine = format_machine(describe_machine(torch.device(device)))
    if torch.device(device).type != "cuda":
        return machine
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    with contextlib.suppress(OSError, subprocess.CalledProcessError):
        driver = subprocess.run(query, capture_output=True, text=True, check=True).stdout.split()[0]
        machine += f", driver {driver}, CUDA {torch.version.cuda}"
    return machine


def run_part(name: str, device: str, folder: Path) -> bool:
    """Run one part and write it. Returns whether it ran to its end."""
    run, arguments = PARTS[name]
    start, complete = perf_counter(), True
    print(f"== {name}", flush=True)
    try:
        text = run(*arguments, device)
    except Exception as error:  # the report says what failed, and the other parts still run
        text, complete = f"{type(error).__name__}: {error}", False
    body = f"## {name}\n\n{run.__doc__} {describe(device)}. {perf_counter() - start:.0f} s.\n\n{text}\n"
    folder.mkdir(parents=True, exist_ok=True)
    write_aside(folder / f"{name}.md", lambda path: Path(path).write_text(body))
    return complete


def write_report(folder: Path, target: Path) -> None:
    """Join the parts to one page.

    Raises:
        ValueError: no part was run.
    """
    parts = [folder / f"{name}.md" for name in PARTS if (folder / f"{name}.md").exists()]
    if not parts:
        raise ValueError(f"out must hold at least one part, got {folder}")
    missing = [name for name in PARTS if folder / f"{name}.md" not in parts]
    head = "# On a GPU\n\nWritten by `python -m benchmarks.gpu`." + (f" Not run: {', '.join(missing)}." * bool(missing))
    text = "\n".join([head + "\n", *(part.read_text() for part in parts)])
    write_aside(target, lambda path: Path(path).write_text(text))


def main(argv: Sequence[str] | None = None) -> int:
    """Run parts, or join them to a report.

    Args:
        argv: arguments after the program name. None: those of the process.

    Returns:
        Exit status: 0, 1 if a part did not run to its end, or 2 if an argument is invalid.
    """
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"{', '.join(PARTS)}, all or report (default: list)")
    parser.add_argument("--device", default="cuda", help="cuda, cuda:1, ... (default: cuda)")
    parser.add_argument("--out", type=Path, default=Path("runs/gpu"), help="folder of the parts (default: runs/gpu)")
    parser.add_argument("--report", type=Path, default=Path("docs/gpu.md"), help="(default: docs/gpu.md)")
    args = parser.parse_args(argv)
    try:
        for name in args.parts:
            check_choice("part", name, [*PARTS, "all", "report"])
        if not args.parts:
            print("\n".join(f"{name:<12}  {run.__doc__}" for name, (run, _) in PARTS.items()))
            return 0
        names = list(PARTS) if "all" in args.parts else [name for name in args.parts if name != "report"]
        if names:
            check_device(args.device)
        complete = [run_part(name, args.device, args.out) for name in names]
        if {"all", "report"} & {*args.parts}:
            write_report(args.out, args.report)
    except (ValueError, OSError) as error:
        print(f"benchmarks.gpu: {error}", file=sys.stderr)
        return 2
    return int(not all(complete))


if __name__ == "__main__":
    sys.exit(main())
