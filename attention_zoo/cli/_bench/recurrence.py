"""What recurrences with one gate per channel cost, beside copying and beside a tree of steps."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from attention_zoo.cli._bench.measure import Setup, compare
from attention_zoo.ops.gate_loop import HAS_NUMBA, channel_gate_loop, linear_recurrence
from attention_zoo.ops.gate_loop.gates import unit_gate

SIZES = ((4, 1024), (1, 4096))  # rows and tokens


@dataclass(frozen=True)
class RecurrenceCost:
    """One comparison at one size.

    Attributes:
        what: what is compared to what.
        rows, length: batch and tokens n.
        ours_ms, beside_ms: median milliseconds of ours and of what it is held against.
        ratio: beside over ours, the median over pairs timed in turn.
    """

    what: str
    rows: int
    length: int
    ours_ms: float
    beside_ms: float
    ratio: float


def measure_recurrences(setup: Setup) -> Iterator[RecurrenceCost]:
    """Compare at each size, without gradients.

    The complex recurrence stands beside reading its two inputs and writing its output once, as fast as one of them is
    copied; the gate loop beside a recursive associative scan in plain torch.
    """
    ways = ["scan", *(["numba"] if HAS_NUMBA and setup.device.type == "cpu" else [])]
    for rows, length in SIZES:
        q, k, v = (torch.randn(rows, length, setup.dim, device=setup.device) for _ in range(3))
        z = torch.randn(rows, length, setup.dim, 2, device=setup.device)
        gate, written = unit_gate(z), torch.complex(k * v, torch.zeros_like(k))
        copy, tree = partial(torch.empty_like(written).copy_, written), partial(tree_mixing, q, k, v, z)
        for impl in ways:
            recur = partial(linear_recurrence, gate, written, impl=impl)
            # a copy reads and writes, two of the recurrence's three passes over memory
            yield _row(f"{impl}: recurrence, beside a copy", rows, length, recur, copy, setup, passes=1.5)
            mix = partial(channel_gate_loop, q, k, v, z, impl=impl)
            yield _row(f"{impl}: gate loop, beside a tree", rows, length, mix, tree, setup)


def tree_mixing(q: Tensor, k: Tensor, v: Tensor, z: Tensor) -> Tensor:
    """The gate loop of one gate per channel by a recursive associative scan, as the paper proposes it."""
    gate = torch.polar(z.norm(dim=-1).sigmoid(), torch.atan2(z[..., 1], z[..., 0]))
    written = k * v
    return q * associative_scan(gate, torch.complex(written, torch.zeros_like(written)))[1].real


def associative_scan(a: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """a_t ... a_1 and h_t = a_t h_{t-1} + x_t for every token: pairs of neighbours combined, and the rest recursively.

    Args:
        a, x: (b, n, d).
    """
    if a.shape[1] == 1:
        return a, x
    even = slice(0, a.shape[1] - 1, 2)
    pairs = associative_scan(a[:, even] * a[:, 1::2], a[:, 1::2] * x[:, even] + x[:, 1::2])
    products, states = torch.empty_like(a), torch.empty_like(x)
    products[:, 1::2], states[:, 1::2] = pairs
    products[:, 0], states[:, 0] = a[:, 0], x[:, 0]
    later = a[:, 2::2]
    before = [tensor[:, : later.shape[1]] for tensor in pairs]
    products[:, 2::2] = before[0] * later
    states[:, 2::2] = later * before[1] + x[:, 2::2]
    return products, states


def _row(
    what: str,
    rows: int,
    length: int,
    ours: Callable[[], object],
    beside: Callable[[], object],
    setup: Setup,
    *,
    passes: float = 1.0,
) -> RecurrenceCost:
    with torch.no_grad():
        beside_time, our_time, ratio = compare(beside, ours, setup.device, setup.runs)
    return RecurrenceCost(what, rows, length, our_time * 1000, passes * beside_time * 1000, passes * ratio)
