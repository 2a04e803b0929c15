"""The chunked gate loop against the recurrence, in outputs, gradients and states."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from attention_zoo.ops.gate_loop import gate_loop, gate_loop_weights, unit_gate
from attention_zoo.ops.gate_loop.gates import magnitude
from tests.formulas import relative_error

fast = pytest.mark.parametrize("impl", ["chunked", "batched"])


def make(n: int, dtype: torch.dtype = torch.float64, e: int = 5, e_v: int = 3) -> list[Tensor]:
    q, k, v = (torch.randn(2, 3, n, size, dtype=dtype) for size in (e, e, e_v))
    complex_dtype = torch.complex128 if dtype == torch.float64 else torch.complex64
    gate = unit_gate(torch.randn(2, 3, n, 2, dtype=dtype)).to(complex_dtype)
    state = torch.randn(2, 3, e, e_v, dtype=complex_dtype)
    return [tensor.requires_grad_() for tensor in (q, k, v, gate, state)]


def both(leaves: list[Tensor], fast: str) -> list[tuple[Tensor, ...]]:
    weight = torch.randn_like(leaves[2])
    found = []
    for impl in ("reference", fast):
        out, last = gate_loop(*leaves[:4], state=leaves[4], impl=impl)
        loss = (out * weight).sum() + (last.real * 0.7 - last.imag * 0.3).sum()
        grads = torch.autograd.grad(loss, leaves)
        found.append(tuple(torch.view_as_real(t) if t.is_complex() else t for t in (out, last, *grads)))
    return found


@fast
@pytest.mark.parametrize("n", [1, 2, 63, 64, 65, 131, 192])
def test_chunks_equal_the_recurrence_in_outputs_states_and_gradients(n: int, impl: str) -> None:
    for want, got in zip(*both(make(n), impl), strict=True):
        assert relative_error(got, want) < 1e-11


@fast
def test_float32_chunks_are_close_to_the_recurrence(impl: str) -> None:
    for want, got in zip(*both(make(200, torch.float32), impl), strict=True):
        assert relative_error(got, want) < 1e-5


@pytest.mark.parametrize("size", [1e-12, 1e-3, 0.1, 0.3, 0.7, 1.0])
@fast
def test_chunks_equal_the_recurrence_for_gates_of_every_size(size: float, impl: str) -> None:
    leaves = make(150, torch.float32)
    with torch.no_grad():
        leaves[3].mul_(size / leaves[3].abs())
    for want, got in zip(*both(leaves, impl), strict=True):
        assert relative_error(got, want) < 2e-5


def test_magnitudes_are_never_denormal() -> None:
    """Denormal numbers slow matrix products down tenfold."""
    for dtype in (torch.float32, torch.float64):
        found = magnitude(torch.arange(0.0, -800.0, -0.25, dtype=torch.float64), dtype)
        assert bool(((found == 0) | (found.square() >= torch.finfo(dtype).tiny)).all())
        assert float(found[0]) == 1
        assert float(found[-1]) == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@fast
def test_a_gate_of_zero_resets_the_state_and_has_an_exact_gradient(dtype: torch.dtype, impl: str) -> None:
    leaves = make(90, dtype)
    with torch.no_grad():
        leaves[3][:, :, [0, 5, 6, 70]] = 0
        leaves[3][:, :, 30:40] = 1e-20
        leaves[3][:, :, 40:50] = 1
    for want, got in zip(*both(leaves, impl), strict=True):
        assert bool(got.isfinite().all())
        assert relative_error(got, want) < 1e-5
    cut = gate_loop(*(t[:, :, 70:] for t in leaves[:4]), impl=impl).out
    assert relative_error(gate_loop(*leaves[:4], state=leaves[4], impl=impl).out[:, :, 70:], cut) < 1e-6


def test_weights_times_values_equal_the_output() -> None:
    q, k, v, gate, _ = make(70)
    assert relative_error(gate_loop_weights(q, k, gate) @ v, gate_loop(q, k, v, gate, impl="reference").out) < 1e-12


def test_heads_of_size_one_equal_the_chunks() -> None:
    leaves = make(40, e=1, e_v=1)
    want = gate_loop(*leaves[:4], state=leaves[4], impl="chunked")
    got = gate_loop(*leaves[:4], state=leaves[4])
    assert relative_error(got.out, want.out) < 1e-12
    assert relative_error(torch.view_as_real(got.state), torch.view_as_real(want.state)) < 1e-12


def test_unit_gate_equals_the_polar_form_and_is_one_half_at_zero() -> None:
    z = torch.randn(50, 2, dtype=torch.float64)
    wide = torch.view_as_complex(z)
    want = torch.polar(wide.abs().sigmoid(), wide.angle())
    assert relative_error(torch.view_as_real(unit_gate(z)), torch.view_as_real(want)) < 1e-14
    zero = torch.zeros(1, 2, requires_grad=True)
    gate = unit_gate(zero)
    assert gate.item() == 0.5
    torch.view_as_real(gate).sum().backward()
    assert zero.grad is not None
    assert bool(zero.grad.isfinite().all())


def test_second_derivatives_of_the_chunks_raise() -> None:
    leaves = make(9)
    out = gate_loop(*leaves[:4], impl="chunked").out
    (first,) = torch.autograd.grad(out.square().sum(), leaves[0], create_graph=True)
    with pytest.raises(RuntimeError, match="reference"):
        torch.autograd.grad(first.sum(), leaves[1])


def test_invalid_states_and_gates_raise() -> None:
    q, k, v, gate, state = make(9)
    with pytest.raises(ValueError, match=r"state must be \(b, h, e, e_v\) = \(2, 3, 5, 3\), got shape \(1, 3, 5, 3\)"):
        gate_loop(q, k, v, gate, state=state[:1])
    with pytest.raises(TypeError, match=r"state must be of dtype torch.complex128.*got torch.complex64"):
        gate_loop(q, k, v, gate, state=state.to(torch.complex64))
    with pytest.raises(TypeError, match=r"gate must be complex, got dtype torch.float64"):
        gate_loop(q, k, v, gate.real)
    with pytest.raises(ValueError, match=r"gate must be \(b, h, n\)"):
        gate_loop(q, k, v, gate[:, :, 1:])
