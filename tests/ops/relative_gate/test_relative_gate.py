"""Attention with relative gates: query tiles against the reference and the definition."""

from __future__ import annotations

import pytest
import torch

from attention_zoo.ops import tiling
from attention_zoo.ops.gate_loop import unit_gate
from attention_zoo.ops.relative_gate import relative_gate_attention, relative_gate_weights, tiled
from tests.formulas import relative_error
from tests.ops.fast_code import forbid


@pytest.mark.parametrize("softmax", [True, False])
@pytest.mark.parametrize(("queries", "keys"), [(1, 1), (9, 9), (31, 40), (67, 67)])
def test_tiles_equal_the_reference_in_outputs_and_gradients(queries: int, keys: int, softmax: bool) -> None:
    q, k, v = (torch.randn(2, 2, n, 6, dtype=torch.float64) for n in (queries, keys, keys))
    gate = unit_gate(torch.randn(2, 2, keys, 3, 2, dtype=torch.float64))
    mask = torch.rand(2, keys) < 0.7
    leaves, found = [t.requires_grad_() for t in (q, k, v, gate)], []
    weight = torch.randn(2, 2, queries, 6, dtype=torch.float64)
    for impl in ("reference", "tiled"):
        out = relative_gate_attention(*leaves, mask=mask, softmax=softmax, impl=impl)
        found.append([out, *torch.autograd.grad((out * weight).sum(), leaves)])
    for want, got in zip(*found, strict=True):
        got, want = (torch.view_as_real(t) if t.is_complex() else t for t in (got, want))
        assert relative_error(got, want) < 1e-10 or float(want.abs().max()) == 0
    weights = relative_gate_weights(q, k, gate, mask=mask, softmax=softmax)
    assert relative_error(weights @ v, found[0][0]) < 1e-10


@pytest.mark.parametrize("size", [1e-12, 1e-3, 0.1, 0.3, 0.7, 1.0])
def test_tiles_equal_the_reference_for_gates_of_every_size(size: float) -> None:
    q, k, v = (torch.randn(1, 2, 140, 6) for _ in range(3))
    gate = torch.polar(torch.full((1, 2, 140, 3), size), torch.randn(1, 2, 140, 3))
    leaves, found = [t.requires_grad_() for t in (q, k, v, gate)], []
    weight = torch.randn(1, 2, 140, 6)
    for impl in ("reference", "tiled"):
        out = relative_gate_attention(*leaves, impl=impl)
        to_q, to_k, to_v, to_gate = torch.autograd.grad((out * weight).sum(), leaves)
        # the tiles compute the gradient of the gate's logarithm, with the rounding error of a gate of 1
        of_log = [torch.view_as_real(to_gate * gate.detach().conj())] if size >= 0.1 else []
        found.append([out, to_q, to_k, to_v, *of_log])
    for want, got in zip(*found, strict=True):
        assert relative_error(got, want) < 2e-5


def test_raw_weights_equal_the_definition() -> None:
    q, k = torch.randn(1, 1, 5, 4, dtype=torch.float64), torch.randn(1, 1, 5, 4, dtype=torch.float64)
    gate = unit_gate(torch.randn(1, 1, 5, 2, 2, dtype=torch.float64))
    got = relative_gate_weights(q, k, gate, softmax=False)[0, 0]
    for i in range(5):
        for j in range(i + 1):
            products = gate[0, 0, j + 1 : i + 1].prod(0).real
            want = 0.5 * ((q[0, 0, i] * k[0, 0, j]).view(2, 2).sum(-1) * products).sum()
            assert float(got[i, j]) == pytest.approx(float(want), abs=1e-12)


def test_a_gate_of_zero_hides_earlier_keys_and_has_a_finite_gradient() -> None:
    q, k, v = (torch.randn(1, 1, 80, 4) for _ in range(3))
    gate = unit_gate(torch.randn(1, 1, 80, 2, 2))
    gate[:, :, [20, 70]] = 0
    gate.requires_grad_()
    out = relative_gate_attention(q, k, v, gate, softmax=False)
    alone = relative_gate_attention(*(t[:, :, 70:] for t in (q, k, v, gate)), softmax=False)
    assert relative_error(out[:, :, 70:], alone) < 1e-5
    (gradient,) = torch.autograd.grad(out.sum(), gate)
    assert bool(torch.view_as_real(gradient).isfinite().all())


def test_dropout_masks_are_the_same_in_backward() -> None:
    q, k, v = (torch.randn(1, 2, 40, 4, dtype=torch.float64, requires_grad=True) for _ in range(3))
    gate = unit_gate(torch.randn(1, 2, 40, 2, 2, dtype=torch.float64))

    def run(*leaves: torch.Tensor) -> torch.Tensor:
        torch.manual_seed(3)
        return relative_gate_attention(*leaves, gate, dropout=0.3)

    assert torch.autograd.gradcheck(run, (q, k, v), fast_mode=True)
    dropped = relative_gate_attention(q, k, torch.ones_like(v), gate, dropout=0.3)[..., 0].detach()
    assert 0.8 < float(dropped.mean()) < 1.2
    assert float(dropped.std()) > 0.01
    assert not bool(relative_gate_attention(q, k, v, gate, dropout=1.0).any())


def test_second_derivatives_of_the_tiles_raise() -> None:
    q, k, v = (torch.randn(1, 1, 9, 4, requires_grad=True) for _ in range(3))
    gate = unit_gate(torch.randn(1, 1, 9, 2, 2))
    (first,) = torch.autograd.grad(relative_gate_attention(q, k, v, gate).square().sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="reference"):
        torch.autograd.grad(first.sum(), k)


@pytest.mark.parametrize("softmax", [True, False])
def test_the_reference_is_twice_differentiable_and_runs_no_fast_code(
    softmax: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    forbid(monkeypatch, tiled, tiling)
    q, k, v = (torch.randn(1, 2, n, 4, dtype=torch.float64, requires_grad=True) for n in (3, 5, 5))
    gate = unit_gate(torch.randn(1, 2, 5, 2, 2, dtype=torch.float64)).requires_grad_()
    mask = torch.tensor([[True, False, True, True, True]])

    def attend(*leaves: torch.Tensor) -> torch.Tensor:
        return relative_gate_attention(*leaves, mask=mask, softmax=softmax, impl="reference")

    assert torch.autograd.gradcheck(attend, (q, k, v, gate), fast_mode=True)
    assert torch.autograd.gradgradcheck(attend, (q, k, v, gate), fast_mode=True)
    with pytest.raises(AssertionError, match="fast code ran"):
        relative_gate_attention(q, k, v, gate)


@pytest.mark.parametrize("n", [1, 40])
def test_the_gate_of_the_first_key_has_no_gradient_in_its_magnitude(n: int) -> None:
    """No product contains it."""
    q, k, v = (torch.randn(1, 2, n, 4) for _ in range(3))
    gate = torch.rand(1, 2, n, 2, dtype=torch.complex64).real.add(0.1).to(torch.complex64).requires_grad_()
    (gradient,) = torch.autograd.grad(relative_gate_attention(q, k, v, gate).sum(), gate)
    assert float(gradient[:, :, 0].real.abs().max()) < 1e-12


@pytest.mark.parametrize("size", [0.0, 1e-6, 0.9])
def test_a_single_query_equals_the_last_of_all_queries(size: float) -> None:
    q, k, v = (torch.randn(2, 2, 70, 4) for _ in range(3))
    gate = torch.polar(torch.full((2, 2, 70, 2), 0.9), torch.randn(2, 2, 70, 2))
    gate[:, :, 50] *= size
    whole = relative_gate_attention(q, k, v, gate)
    assert relative_error(relative_gate_attention(q[:, :, -1:], k, v, gate), whole[:, :, -1:]) < 1e-6


def test_invalid_gates_raise() -> None:
    q = torch.randn(1, 2, 5, 4)
    gate = unit_gate(torch.randn(1, 2, 5, 2, 2))
    with pytest.raises(TypeError, match=r"gate must be complex, got dtype torch.float32"):
        relative_gate_attention(q, q, q, gate.real)
    with pytest.raises(ValueError, match=r"gate must be \(b, h, j, e / 2\) = \(1, 2, 5, 2\)"):
        relative_gate_attention(q, q, q, gate[:, :, 1:])
