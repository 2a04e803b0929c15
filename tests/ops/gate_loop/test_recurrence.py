"""The fast linear recurrences against the reference and the definition."""

from __future__ import annotations

import pytest
import torch

from attention_zoo.ops.gate_loop import linear_recurrence, recurrence
from tests.formulas import relative_error


def make(n: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    a, x = torch.randn(2, n, 3, dtype=dtype), torch.randn(2, n, 3, dtype=dtype)
    a = a / (a.abs() + 0.1)
    a[:, n // 2] = 0  # a hard reset
    return a.requires_grad_(), x.requires_grad_(), torch.randn(2, 3, dtype=dtype, requires_grad=True)


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
@pytest.mark.parametrize("n", [1, 2, 7, 16, 17, 131])
@pytest.mark.parametrize("fast", ["scan", "batched", "numba"])
def test_fast_implementations_equal_the_reference_in_outputs_and_gradients(
    n: int, dtype: torch.dtype, fast: str
) -> None:
    if fast == "numba":
        pytest.importorskip("numba")
    leaves = make(n, dtype)
    weight = torch.randn(2, n, 3, dtype=dtype)
    found = []
    for impl in ("reference", fast):
        out, last = linear_recurrence(leaves[0], leaves[1], state=leaves[2], impl=impl)
        loss = (out * weight).sum().abs() + last.abs().sum()
        found.append((out, *torch.autograd.grad(loss, leaves)))
    for want, got in zip(*found, strict=True):
        assert bool(got.isfinite().all())
        assert relative_error(torch.view_as_real(got + 0j), torch.view_as_real(want + 0j)) < 1e-11


def test_the_reference_equals_the_closed_form_and_the_scan_its_derivatives() -> None:
    a, x, state = make(5, torch.float64)
    out = linear_recurrence(a, x, state=state, impl="reference").out
    want = sum(x[:, j] * a[:, j + 1 : 5].prod(1) for j in range(5)) + state * a.prod(1)
    assert relative_error(out[:, -1], want) < 1e-12
    run = lambda *leaves: linear_recurrence(leaves[0], leaves[1], state=leaves[2], impl="scan").out  # noqa: E731
    assert torch.autograd.gradcheck(run, (a, x, state))


def test_second_derivatives_of_the_scan_raise() -> None:
    a, x, _ = make(5, torch.float64)
    (first,) = torch.autograd.grad(linear_recurrence(a, x, impl="scan").out.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="reference"):
        torch.autograd.grad(first.sum(), x, allow_unused=True)


def test_a_long_sequence_in_pieces_equals_the_whole_sequence() -> None:
    a, x = torch.rand(1, 100_000, 2), torch.randn(1, 100_000, 2)
    whole, state, pieces = linear_recurrence(a, x).out, None, []
    for gates, inputs in zip(a.split(7001, 1), x.split(7001, 1), strict=True):
        out, state = linear_recurrence(gates, inputs, state=state)
        pieces.append(out)
    assert relative_error(torch.cat(pieces, 1), whole) < 1e-6


def test_half_precision_runs_in_float32_and_invalid_states_raise() -> None:
    a, x = torch.rand(2, 9, 3).bfloat16(), torch.randn(2, 9, 3).bfloat16()
    out, state = linear_recurrence(a, x)
    assert out.dtype == torch.bfloat16
    assert state.dtype == torch.float32
    with pytest.raises(ValueError, match=r"state must be \(b, d\)"):
        linear_recurrence(a, x, state=state[:1])
    with pytest.raises(TypeError, match="state must be of dtype"):
        linear_recurrence(a, x, state=state.double())


def test_missing_numba_raises_an_error_that_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recurrence, "HAS_NUMBA", False)
    a, x = torch.rand(1, 4, 2), torch.randn(1, 4, 2)
    with pytest.raises(ImportError, match=r"attention-zoo\[fast\]"):
        linear_recurrence(a, x, impl="numba")
    assert linear_recurrence(a, x).out.shape == x.shape


def test_tokens_with_many_features_run_step_by_step_and_equal_the_reference() -> None:
    a, x = torch.rand(2, 9, 1100, dtype=torch.float64), torch.randn(2, 9, 1100, dtype=torch.float64)
    assert (
        relative_error(linear_recurrence(a, x, impl="scan").out, linear_recurrence(a, x, impl="reference").out) < 1e-14
    )


@pytest.mark.parametrize("impl", ["auto", "scan", "batched", "numba"])
def test_an_empty_batch_gives_empty_states_and_gradients(impl: str) -> None:
    for n in (1, 7):
        a, x = (torch.rand(0, n, 5, requires_grad=True) for _ in range(2))
        out, state = linear_recurrence(a, x, impl=impl)
        out.sum().backward()
        assert out.shape == a.grad.shape == (0, n, 5)
        assert state.shape == (0, 5)


def test_an_initial_state_that_does_not_fit_raises() -> None:
    a, x = torch.rand(2, 3, 5), torch.rand(2, 3, 5)
    with pytest.raises(TypeError, match="state must be a tensor, got list"):
        linear_recurrence(a, x, state=[0.0])
    with pytest.raises(ValueError, match="state must be on the device of the inputs, cpu, got meta"):
        linear_recurrence(a, x, state=torch.zeros(2, 5, device="meta"))
