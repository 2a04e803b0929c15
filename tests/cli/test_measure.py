"""Peak memory, durations and the machine of a measurement."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from attention_zoo.cli._bench.measure import compare, peak_bytes, seconds

CPU = torch.device("cpu")
MB = 10**6


def test_peak_of_an_allocation_is_its_size() -> None:
    peak = peak_bytes(lambda: torch.zeros(10 * MB, dtype=torch.uint8), CPU)
    assert peak == pytest.approx(10 * MB, rel=0.01)


def test_released_memory_does_not_count_towards_the_peak() -> None:
    def in_turn() -> None:
        for _ in range(3):
            torch.zeros(10 * MB, dtype=torch.uint8)

    def together() -> list[Tensor]:
        return [torch.zeros(10 * MB, dtype=torch.uint8) for _ in range(3)]

    assert peak_bytes(in_turn, CPU) == pytest.approx(10 * MB, rel=0.01)
    assert peak_bytes(together, CPU) == pytest.approx(30 * MB, rel=0.01)


def test_peak_includes_temporaries_of_operators_and_of_backward() -> None:
    x = torch.randn(MB, requires_grad=True)  # 4 MB, allocated before and therefore not counted

    def step() -> tuple[Tensor, ...]:
        y = x.exp()  # 4 MB, kept for the backward pass, which adds the gradients of y and of x
        return torch.autograd.grad(y, x, torch.ones_like(y))

    assert peak_bytes(step, CPU) == pytest.approx(12 * MB, rel=0.01)


def test_times_and_ratios_are_positive() -> None:
    assert seconds(lambda: sum(range(1000)), CPU) > 0
    assert all(value > 0 for value in compare(lambda: sum(range(1000)), lambda: sum(range(1000)), CPU, 3))
