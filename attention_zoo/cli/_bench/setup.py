"""Options of a measurement: sizes, number of runs and device; and a description of the machine."""

from __future__ import annotations

import argparse
import json
import platform
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from attention_zoo._checks import check_choice, check_positive
from attention_zoo._files import write_aside

SIZES = {
    "dim": (512, "number of features"),
    "heads": (8, "number of heads"),
    "dim_head": (64, "features per head"),
    "runs": (7, "timed runs; the median is reported"),
    "threads": (1, "number of CPU threads"),
}
EXTRA = {"batch": "batch", "compiled": "compile"}  # fields of `Setup` and their options, which not all commands have
Machine = dict[str, str | int | None]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Setup:
    """What is measured, and where.

    Attributes:
        dim, heads, dim_head: sizes of a layer.
        runs: number of timed calls, of which the median is taken.
        device, dtype: device and dtype of weights and inputs.
        batch: batch size b.
        compiled: whether layers and models run under torch.compile.
    """

    dim: int
    heads: int
    dim_head: int
    runs: int
    device: torch.device
    dtype: torch.dtype
    batch: int = 1
    compiled: bool = False

    def compile(self, run: Callable[..., Any]) -> Callable[..., Any]:
        """`run`, under torch.compile if that is measured."""
        return torch.compile(run, dynamic=False) if self.compiled else run

    def randn(self, *shape: int) -> Tensor:
        """Random normal numbers."""
        return torch.randn(shape, device=self.device, dtype=self.dtype)


def add_setup_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of a `Setup`, `--threads` and `--json`."""
    for name, (default, meaning) in SIZES.items():
        add_size(parser, name, default, meaning)
    parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1, ... (default: cpu)")
    parser.add_argument("--dtype", default="float32", help=f"{', '.join(DTYPES)} (default: float32)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write all results to this JSON file")


def add_size(parser: argparse.ArgumentParser, name: str, default: int, meaning: str) -> None:
    """Declare the option of a positive integer."""
    flag = f"--{name.replace('_', '-')}"
    parser.add_argument(flag, type=int, default=default, metavar="N", help=f"{meaning} (default: {default})")


def check_file(name: str, path: Path | None) -> None:
    """Check that a file can be written to `path`.

    Raises:
        ValueError: `path` is a directory, or is in a directory that does not exist.
    """
    if path is not None and (path.is_dir() or not path.absolute().parent.is_dir()):
        raise ValueError(f"{name} must be a file in a folder that exists, got {name}={str(path)!r}")


def check_device(name: str) -> None:
    """Check that this machine has a device.

    Raises:
        ValueError: it has not.
    """
    gpus = [f"cuda:{index}" for index in range(torch.cuda.device_count())]
    check_choice("device", name, ["cpu", "cuda", *gpus] if gpus else ["cpu"])


def describe_machine(device: torch.device) -> Machine:
    """What a time depends on: processor, number of threads, torch version, and GPU if one is used."""
    info = Path("/proc/cpuinfo")
    name = re.search(r"^model name\s*: (.*)$", info.read_text(errors="replace"), re.M) if info.exists() else None
    return {
        "cpu": name[1].strip() if name else platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
    }


def format_machine(machine: Machine) -> str:
    """The result of `describe_machine` in one line."""
    count = f"{machine['threads']} thread{'' if machine['threads'] == 1 else 's'}"
    parts = [machine["cpu"], count, f"torch {machine['torch']}", machine["gpu"]]
    return ", ".join(str(part) for part in parts if part)


def format_sizes(setup: Setup) -> str:
    """Dtype, dim and batch size in one line."""
    dtype = str(setup.dtype).removeprefix("torch.")
    return f"{dtype}, dim {setup.dim}, batch {setup.batch}" + (", compiled" if setup.compiled else "")


@contextmanager
def measuring(args: argparse.Namespace) -> Iterator[tuple[Setup, Machine]]:
    """Check the options, print machine and sizes, and use `--threads` CPU threads inside this context.

    Raises:
        ValueError: a size is below 1, the device or dtype is unknown, or the JSON file cannot be written.
    """
    check_positive(**{name: getattr(args, name) for name in SIZES})
    check_choice("dtype", args.dtype, DTYPES)
    check_device(args.device)
    check_file("json", args.json)
    more = {name: getattr(args, option) for name, option in EXTRA.items() if hasattr(args, option)}
    check_positive(**{name: value for name, value in more.items() if name == "batch"})
    device, dtype = torch.device(args.device), DTYPES[args.dtype]
    setup = Setup(args.dim, args.heads, args.dim_head, args.runs, device, dtype, **more)
    before = torch.get_num_threads()
    torch.set_num_threads(args.threads)
    try:
        machine = describe_machine(setup.device)
        print(format_machine(machine))
        print(f"{format_sizes(setup)}, heads {args.heads}, dim_head {args.dim_head}, {args.runs} runs\n")
        yield setup, machine
    finally:
        torch.set_num_threads(before)


def write_json(args: argparse.Namespace, machine: Machine, **results: Any) -> None:
    """Write results with their settings to the file of `--json`, if given."""
    if args.json is not None:
        names = ("device", "dtype", *SIZES, *EXTRA.values())
        settings = {name: getattr(args, name) for name in names if hasattr(args, name)}
        text = json.dumps({"machine": machine, "settings": settings, **results}, indent=2) + "\n"
        write_aside(args.json, lambda path: Path(path).write_text(text))
