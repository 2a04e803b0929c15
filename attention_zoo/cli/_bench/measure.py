"""Time and peak memory of a call."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from statistics import median

import torch
from torch.autograd.profiler import profile

WARM_UP = 2  # untimed calls: the first ones select kernels, fill caches and allocate memory

Call = Callable[[], object]


def seconds(call: Call, device: torch.device) -> float:
    """Duration of one call: by the clock on a CPU, by events in the current stream on a GPU."""
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
    """Median duration of `runs` calls after `WARM_UP` untimed ones."""
    for _ in range(WARM_UP):
        call()
    return median(seconds(call, device) for _ in range(runs))


def alternate(calls: Sequence[Call], device: torch.device, runs: int) -> list[list[float]]:
    """Seconds of each call in each of `runs` rounds, after `WARM_UP` untimed rounds."""
    for _ in range(WARM_UP):
        for call in calls:
            call()
    return [[seconds(call, device) for call in calls] for _ in range(runs)]


def compare(call: Call, baseline: Call, device: torch.device, runs: int) -> tuple[float, float, float]:
    """Time two calls alternately, so that a temporary slowdown of the machine affects both.

    Returns:
        The median seconds of each, and the median of call / baseline over the pairs.
    """
    pairs = alternate((call, baseline), device, runs)
    first, second = zip(*pairs, strict=True)
    return median(first), median(second), median(a / b for a, b in pairs)


def peak_bytes(call: Call, device: torch.device) -> int:
    """Peak memory of one call beyond what was allocated before it; inputs and weights do not count.

    On a CPU, the maximum of the running sum of all allocations and releases of torch's allocator, as recorded by
    torch's profiler. It includes temporaries inside operators and the backward pass, is exact and reproducible, and
    excludes memory that other libraries allocate themselves. On a GPU, `max_memory_allocated` of the caching allocator.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # otherwise the profiler reports start and stop on stderr
    with profile(profile_memory=True) as recorded:
        call()
    events = [event for event in recorded.kineto_results.events() if event.name() == "[memory]"]
    live = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        live += event.nbytes()  # negative for a release
        peak = max(peak, live)
    return peak
