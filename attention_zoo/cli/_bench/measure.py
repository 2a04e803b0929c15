"""Time and peak memory of a call, and the machine on which they were taken."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import torch
from torch.autograd.profiler import profile

WARM_UP = 2  # untimed calls: the first ones pick kernels, fill caches and touch fresh memory

Call = Callable[[], object]


@dataclass(frozen=True)
class Setup:
    """What is measured at which size, and where.

    Attributes:
        dim, heads, dim_head: sizes of a block.
        depth: layers of a language model.
        runs: timed calls, of which the median counts.
        device, dtype: where and in what it computes.
    """

    dim: int
    heads: int
    dim_head: int
    depth: int
    runs: int
    device: torch.device
    dtype: torch.dtype


def check_device(name: str) -> torch.device:
    """The device called `name`.

    Raises:
        ValueError: it is neither "cpu" nor a CUDA device of this machine.
    """
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"device must be cpu, cuda or cuda:0, cuda:1, ..., got device={name!r}") from error
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"device must be cpu or cuda, got device={name!r}")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"device must be on this machine, which has {torch.cuda.device_count()} GPUs, got {name!r}")
    return device


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Let torch's operators use `count` CPU threads inside this context."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def describe_machine(device: torch.device) -> dict[str, str | int | None]:
    """What a time depends on: processor, threads, version of torch, and the GPU where one is used."""
    return {
        "cpu": _processor(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
    }


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text(errors="replace").splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def seconds(call: Call, device: torch.device) -> float:
    """How long one call takes: by the clock on a CPU, on a GPU by events around it in its stream."""
    if device.type == "cuda":
        stream = torch.cuda.current_stream(device)
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        torch.cuda.synchronize(device)
        start.record(stream)
        call()
        stop.record(stream)
        torch.cuda.synchronize(device)
        return float(start.elapsed_time(stop)) / 1000
    begin = time.perf_counter_ns()
    call()
    return (time.perf_counter_ns() - begin) / 1e9


def median_seconds(call: Call, device: torch.device, runs: int) -> float:
    """The median of `runs` timed calls after warming up."""
    for _ in range(WARM_UP):
        call()
    return median(seconds(call, device) for _ in range(runs))


def compare(call: Call, yardstick: Call, device: torch.device, runs: int) -> tuple[float, float, float]:
    """Time two calls in turn, so that what slows the machine for a while slows both.

    Returns:
        The median seconds of either, and the median of call / yardstick over the pairs.
    """
    for _ in range(WARM_UP):
        call()
        yardstick()
    pairs = [(seconds(call, device), seconds(yardstick, device)) for _ in range(runs)]
    first, second = zip(*pairs, strict=True)
    return median(first), median(second), median(a / b for a, b in pairs)


def peak_bytes(call: Call, device: torch.device) -> int:
    """The most memory that one call holds at a time, beyond what was held before it: inputs and weights do not count.

    On a CPU every allocation and release by torch's allocator is recorded by torch's profiler, temporaries inside
    operators and the backward pass included, and their running sum's maximum taken: exact to the byte and the same in
    every run. What libraries below torch take by themselves is not seen. On a GPU it is the caching allocator's
    `max_memory_allocated`.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        torch.cuda.synchronize(device)
        return int(torch.cuda.max_memory_allocated(device)) - before
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler reports its start and stop on stderr otherwise
    with profile(profile_memory=True) as recorded:
        call()
    results = recorded.kineto_results
    assert results is not None
    events = [event for event in results.events() if event.name() == "[memory]"]
    live = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        live += event.nbytes()  # negative for a release
        peak = max(peak, live)
    return peak
