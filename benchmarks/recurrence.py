"""Recurrences with one gate per channel, compared with a copy and with a recursive associative scan."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from dataclasses import astuple, dataclass
from functools import partial
from importlib.util import find_spec

import torch
from torch import Tensor

from attention_zoo.cli._bench.measure import compare
from attention_zoo.cli._bench.setup import Setup
from attention_zoo.cli._table import print_rows
from attention_zoo.ops import channel_gate_loop, linear_recurrence, unit_gate

SIZES = ((4, 1024), (1, 4096))  # rows and tokens
COLUMNS = {"what": "<33", "rows": ">4", "length": ">6", "ours ms": ">7", "beside ms": ">9", "beside/ours": ">11"}


@dataclass(frozen=True)
class RecurrenceCost:
    """One comparison at one size.

    Attributes:
        what: what is compared.
        rows, length: batch size and number of tokens n.
        ours_ms, beside_ms: median milliseconds of ours and of the baseline.
        ratio: baseline over ours, the median over pairs timed alternately.
    """

    what: str
    rows: int
    length: int
    ours_ms: float
    beside_ms: float
    ratio: float


def run(setup: Setup, args: argparse.Namespace) -> list[RecurrenceCost]:
    """Compare at each size, without gradients."""
    return print_rows(COLUMNS, measure_recurrences(setup), astuple)


def measure_recurrences(setup: Setup) -> Iterator[RecurrenceCost]:
    """Compare the complex recurrence with memory speed, and the gate loop with a recursive associative scan.

    Memory speed: the time to read the two inputs and write the output, as fast as one of them is copied.
    """
    on_cpu = setup.device.type == "cpu"
    impls = ["scan", *(["numba"] if find_spec("numba") else [])] if on_cpu else ["batched"]
    for rows, length in SIZES:
        q, k, v = (torch.randn(rows, length, setup.dim, device=setup.device) for _ in range(3))
        z = torch.randn(rows, length, setup.dim, 2, device=setup.device)
        gate, inputs = unit_gate(z), torch.complex(k * v, torch.zeros_like(k))
        copy, tree = partial(torch.empty_like(inputs).copy_, inputs), partial(tree_gate_loop, q, k, v, z)
        for impl in impls:
            recurrence = partial(linear_recurrence, gate, inputs, impl=impl)
            # a copy makes two of the three passes over memory of the recurrence
            yield _compare(f"{impl}: recurrence, beside a copy", rows, length, recurrence, copy, setup, passes=1.5)
            gate_loop = partial(channel_gate_loop, q, k, v, z, impl=impl)
            yield _compare(f"{impl}: gate loop, beside a tree", rows, length, gate_loop, tree, setup)


def tree_gate_loop(q: Tensor, k: Tensor, v: Tensor, z: Tensor) -> Tensor:
    """The gate loop with one gate per channel by a recursive associative scan, as proposed in the paper.

    Args:
        q, k, v: (b, n, d).
        z: (b, n, d, 2), real and imaginary part of the gates before the activation.

    Returns:
        (b, n, d).
    """
    gate = torch.polar(z.norm(dim=-1).sigmoid(), torch.atan2(z[..., 1], z[..., 0]))
    inputs = k * v
    return q * associative_scan(gate, torch.complex(inputs, torch.zeros_like(inputs)))[1].real


def associative_scan(a: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """a_t ... a_1 and h_t = a_t h_{t-1} + x_t for every token: combine neighbouring pairs, then recurse.

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


def _compare(
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
