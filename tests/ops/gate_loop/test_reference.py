"""References of the gate loops: they are twice differentiable and run no code of the fast implementations."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

import attention_zoo
from attention_zoo.ops.gate_loop import (
    channel,
    channel_gate_loop,
    chunked,
    gate_loop,
    linear_recurrence,
    numba_kernels,
    recurrence,
)
from tests.ops.fast_code import forbid

MASK = torch.tensor([[True, False, True, True], [False, True, True, False]])


def real(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, requires_grad=True)


def complex_numbers(*shape: int) -> Tensor:
    return (torch.randn(shape, dtype=torch.complex128) / 2).requires_grad_()


def run_gate_loop(impl: str, q: Tensor, k: Tensor, v: Tensor, gate: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    return gate_loop(q, k, v, gate, state=state, impl=impl)


def run_channel_gate_loop(
    impl: str, q: Tensor, k: Tensor, v: Tensor, z: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    return channel_gate_loop(q, k, v, z, mask=MASK, state=state, impl=impl)


def run_linear_recurrence(impl: str, a: Tensor, x: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    return linear_recurrence(a, x, state=state, impl=impl)


def inputs(run: Callable[..., object], dtype: torch.dtype) -> list[Tensor]:
    """Inputs of one of the functions above; `dtype` is that of the recurrence."""
    if run is run_gate_loop:
        e, e_v = (3, 2) if dtype == torch.complex128 else (1, 1)  # "auto" treats heads of size 1 separately
        return [
            real(2, 2, 4, e),
            real(2, 2, 4, e),
            real(2, 2, 4, e_v),
            complex_numbers(2, 2, 4),
            complex_numbers(2, 2, e, e_v),
        ]
    if run is run_channel_gate_loop:
        return [*(real(2, 4, 3) for _ in range(3)), real(2, 4, 3, 2), complex_numbers(2, 3)]
    make = complex_numbers if dtype == torch.complex128 else real
    return [make(2, 4, 3), make(2, 4, 3), make(2, 3)]


operations = pytest.mark.parametrize("run", [run_gate_loop, run_channel_gate_loop, run_linear_recurrence])
dtypes = pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])


@pytest.fixture
def no_fast_code(monkeypatch: pytest.MonkeyPatch) -> None:
    forbid(monkeypatch, chunked, channel, recurrence, numba_kernels)


@operations
@dtypes
@pytest.mark.parametrize("forced_by", ["impl", "context"])
@pytest.mark.usefixtures("no_fast_code")
def test_references_are_twice_differentiable_and_run_no_fast_code(
    run: Callable[..., tuple[Tensor, Tensor]], dtype: torch.dtype, forced_by: str
) -> None:
    def compute(*leaves: Tensor) -> tuple[Tensor, ...]:
        return tuple(run("reference" if forced_by == "impl" else "auto", *leaves))

    leaves = inputs(run, dtype)
    with nullcontext() if forced_by == "impl" else attention_zoo.reference():
        assert gradcheck(compute, leaves, fast_mode=True)
        assert gradgradcheck(compute, leaves, fast_mode=True)


@operations
@dtypes
@pytest.mark.usefixtures("no_fast_code")
def test_the_default_implementations_run_fast_code(
    run: Callable[..., tuple[Tensor, Tensor]], dtype: torch.dtype
) -> None:
    with pytest.raises(AssertionError, match="fast code ran"):
        run("auto", *inputs(run, dtype))


def test_second_derivatives_of_the_channel_reference_are_finite_where_the_gate_has_no_direction() -> None:
    q, k, v, z, _ = inputs(run_channel_gate_loop, torch.complex128)
    with torch.no_grad():
        z[:, 1] = 0
    out = channel_gate_loop(q, k, v, z, impl="reference").out
    (first,) = torch.autograd.grad(out.square().sum(), z, create_graph=True)
    assert not bool(first[:, 1].any())
    for gradient in torch.autograd.grad(first.square().sum(), (q, k, v, z)):
        assert bool(gradient.isfinite().all())
