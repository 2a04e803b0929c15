"""The gate loop through the kernel of flash-linear-attention, replaced by the recurrence that it documents."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from attention_zoo.ops.gate_loop import gate_loop, simple_gla, unit_gate
from tests.formulas import relative_error


def recurrence(
    *, q: Tensor, k: Tensor, v: Tensor, g: Tensor, scale: float, initial_state: Tensor, output_final_state: bool
) -> tuple[Tensor, Tensor]:
    """S_t = exp(g_t) S_{t-1} + k_t v_t^T, o_t = scale q_t^T S_t over (b, n, h, ...)."""
    assert output_final_state
    assert q.dtype == k.dtype == v.dtype
    state, outs = initial_state, []
    for t in range(q.shape[1]):
        state = g[:, t, :, None, None].exp() * state + (k[:, t, :, :, None] * v[:, t, :, None, :]).to(state.dtype)
        outs.append(scale * torch.einsum("bhe,bhef->bhf", q[:, t].to(state.dtype), state).to(q.dtype))
    return torch.stack(outs, 1), state


@pytest.mark.parametrize(
    ("dtype", "limit"), [(torch.float64, 1e-11), (torch.float32, 1e-5), (torch.bfloat16, 2e-2)], ids=str
)
def test_the_folded_arguments_give_the_gate_loop(
    dtype: torch.dtype, limit: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(simple_gla, "load_kernel", lambda: recurrence)
    q, k, v = (torch.randn(2, 3, 90, e).to(dtype).requires_grad_() for e in (4, 4, 5))
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    gate = unit_gate(torch.randn(2, 3, 90, 2, dtype=wide)).requires_grad_()
    state = torch.randn(2, 3, 4, 5, dtype=gate.dtype, requires_grad=True)
    weight, found = torch.randn(2, 3, 90, 5), []
    for impl in ("reference", "fla"):
        out, last = gate_loop(q, k, v, gate, state=state, impl=impl)
        assert out.dtype == dtype
        loss = (out * weight).sum() + (last.real * 0.7 - last.imag * 0.3).sum()
        found.append([out, last, *torch.autograd.grad(loss, (q, k, v, gate, state))])
    for want, got in zip(*found, strict=True):
        want, got = (torch.view_as_real(t) if t.is_complex() else t for t in (want, got))
        assert relative_error(got.double(), want.double()) < limit


def test_a_gate_of_zero_resets_the_state(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(simple_gla, "load_kernel", lambda: recurrence)
    q, k, v = torch.randn(3, 1, 2, 20, 4).unbind()
    gate = unit_gate(torch.randn(1, 2, 20, 2))
    gate[:, :, 12] = 0
    want = gate_loop(*(t[:, :, 12:] for t in (q, k, v, gate)), impl="reference").out
    assert relative_error(gate_loop(q, k, v, gate, impl="fla").out[:, :, 12:], want) < 1e-6


def test_a_missing_package_is_named() -> None:
    q = torch.randn(1, 2, 5, 4)
    with pytest.raises(ImportError, match="impl='fla' needs flash-linear-attention"):
        gate_loop(q, q, q, unit_gate(torch.randn(1, 2, 5, 2)), impl="fla")
