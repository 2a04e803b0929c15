"""The gate loop over heads of size 1: every implementation against the definition, and what it saves for backward."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from attention_zoo.ops.gate_loop import channel_gate_loop, recurrence
from tests.formulas import relative_error

FAST = ["scan", "batched", "numba"]


def make(n: int, dtype: torch.dtype = torch.float64, d: int = 5) -> list[Tensor]:
    q, k, v = (torch.randn(2, n, d, dtype=dtype) for _ in range(3))
    z = torch.randn(2, n, d, 2, dtype=dtype) * 3
    z[:, n // 2] = 0
    state = torch.randn(2, d, dtype=torch.complex128 if dtype == torch.float64 else torch.complex64)
    return [tensor.requires_grad_() for tensor in (q, k, v, z, state)]


def definition(q: Tensor, k: Tensor, v: Tensor, z: Tensor, mask: Tensor | None, state: Tensor) -> tuple[Tensor, Tensor]:
    """The definition with the polar form of the gate, token by token."""
    outs = []
    z = z + torch.where((z == 0).all(-1, keepdim=True), torch.tensor([1e-30, 0.0], dtype=z.dtype), 0.0)
    for t in range(q.shape[1]):
        pair = torch.view_as_complex(z[:, t].contiguous())
        new = torch.polar(pair.abs().sigmoid(), pair.angle()) * state + k[:, t] * v[:, t]
        state = new if mask is None else torch.where(mask[:, t, None], new, state)
        outs.append(q[:, t] * state.real)
    return torch.stack(outs, 1), state


def with_gradients(out: Tensor, last: Tensor, weight: Tensor, leaves: list[Tensor]) -> list[Tensor]:
    loss = (out * weight).sum() + (last.real * 0.7 - last.imag * 0.3).sum()
    found = [out, last, *torch.autograd.grad(loss, leaves)]
    return [torch.view_as_real(tensor) if tensor.is_complex() else tensor for tensor in found]


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("n", [1, 2, 7, 65, 131])
@pytest.mark.parametrize("impl", ["reference", *FAST])
def test_every_implementation_equals_the_definition_in_outputs_and_gradients(impl: str, n: int, masked: bool) -> None:
    if impl == "numba":
        pytest.importorskip("numba")
    leaves = make(n)
    mask = torch.rand(2, n) < 0.6 if masked else None
    weight = torch.randn(2, n, 5, dtype=torch.float64)
    want = with_gradients(*definition(*leaves[:4], mask, leaves[4]), weight, leaves)
    got = with_gradients(*channel_gate_loop(*leaves[:4], mask=mask, state=leaves[4], impl=impl), weight, leaves)
    at_zero = n // 2  # z = 0: the gate is 0.5 and its gradient is defined as 0
    assert not bool(got[5][:, at_zero].any())
    for index, (a, b) in enumerate(zip(got, want, strict=True)):
        if index == 5:
            a, b = (torch.cat((t[:, :at_zero], t[:, at_zero + 1 :]), 1) for t in (a, b))
        assert bool(a.isfinite().all())
        assert relative_error(a, b) < 1e-11 or not bool(b.any())


@pytest.mark.parametrize("impl", FAST)
def test_float32_is_close_to_float64_for_gates_of_every_size(impl: str) -> None:
    if impl == "numba":
        pytest.importorskip("numba")
    leaves = make(67, torch.float32, d=40)
    with torch.no_grad():
        leaves[3][:, :, :30] *= torch.logspace(-15, 3, 30)[:, None]
    wide = [leaf.detach().to(torch.promote_types(leaf.dtype, torch.float64)).requires_grad_() for leaf in leaves]
    weight = torch.randn(2, 67, 40)
    want = with_gradients(*channel_gate_loop(*wide[:4], state=wide[4], impl="reference"), weight.double(), wide)
    got = with_gradients(*channel_gate_loop(*leaves[:4], state=leaves[4], impl=impl), weight, leaves)
    for index, (a, b) in enumerate(zip(got, want, strict=True)):
        assert bool(a.isfinite().all())
        if index != 5:
            assert relative_error(a, b) < 1e-5
    # the gradient across a tiny z is huge, so each channel is compared relative to its own norm
    gaps = (got[5] - want[5]).square().sum((0, 1, 3)) / want[5].square().sum((0, 1, 3))
    assert float(gaps.max()) < 1e-8


@pytest.mark.parametrize("impl", FAST)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_inputs_are_computed_in_float32(impl: str, dtype: torch.dtype) -> None:
    if impl == "numba":
        pytest.importorskip("numba")
    q, k, v, z = (tensor.detach().to(dtype).requires_grad_() for tensor in make(33, torch.float32)[:4])
    out, state = channel_gate_loop(q, k, v, z, impl=impl)
    want = channel_gate_loop(*(tensor.double() for tensor in (q, k, v, z)), impl="reference").out
    assert (out.dtype, state.dtype) == (dtype, torch.complex64)
    assert relative_error(out, want) < 4e-3
    out.float().square().sum().backward()
    assert z.grad is not None
    assert z.grad.dtype == dtype


def test_scan_and_numba_agree_on_tokens_with_many_features() -> None:
    pytest.importorskip("numba")
    leaves = [tensor.detach() for tensor in make(9, torch.float32, d=1100)]
    found = [channel_gate_loop(*leaves[:4], state=leaves[4], impl=impl).out for impl in ("scan", "numba")]
    assert relative_error(*found) < 1e-6


@pytest.mark.parametrize("impl", FAST)
def test_second_derivatives_of_fast_implementations_raise(impl: str) -> None:
    if impl == "numba":
        pytest.importorskip("numba")
    q, k, v, z, _ = make(5)
    (first,) = torch.autograd.grad(channel_gate_loop(q, k, v, z, impl=impl).out.square().sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="reference"):
        torch.autograd.grad(first.sum(), k)


def test_only_inputs_are_saved_for_backward() -> None:
    leaves, saved = make(50, torch.float32), set()

    def pack(tensor: Tensor) -> Tensor:
        saved.add(tensor.untyped_storage().data_ptr())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        channel_gate_loop(*leaves[:4], state=leaves[4])
    assert saved == {tensor.untyped_storage().data_ptr() for tensor in leaves}


def test_a_sequence_in_pieces_equals_the_whole_sequence() -> None:
    leaves = [tensor.detach() for tensor in make(90)]
    whole, last = channel_gate_loop(*leaves[:4], state=leaves[4])
    state, pieces = leaves[4], []
    for start, stop in pairwise((0, 1, 2, 40, 90)):
        out, state = channel_gate_loop(*(tensor[:, start:stop] for tensor in leaves[:4]), state=state)
        pieces.append(out)
    assert relative_error(torch.cat(pieces, 1), whole) < 1e-13
    assert relative_error(torch.view_as_real(state), torch.view_as_real(last)) < 1e-13


def test_missing_numba_raises_an_error_that_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recurrence, "HAS_NUMBA", False)
    leaves = make(4)
    with pytest.raises(ImportError, match=r"attention-zoo\[fast\]"):
        channel_gate_loop(*leaves[:4], impl="numba")
    assert channel_gate_loop(*leaves[:4]).out.shape == leaves[0].shape


def test_invalid_arguments_raise() -> None:
    q, k, v, z, state = make(9)
    with pytest.raises(ValueError, match=r"state must be \(b, d\) = \(2, 5\), got shape \(1, 5\)"):
        channel_gate_loop(q, k, v, z, state=state[:1])
    with pytest.raises(TypeError, match=r"state must be of dtype torch.complex128.*got torch.complex64"):
        channel_gate_loop(q, k, v, z, state=state.to(torch.complex64))
    with pytest.raises(ValueError, match=r"z must be \(b, n, d, 2\) = \(2, 9, 5, 2\), got shape \(2, 9, 5\)"):
        channel_gate_loop(q, k, v, z[..., 0])
    with pytest.raises(ValueError, match=r"q, k and v must be \(b, n, d\)"):
        channel_gate_loop(q, k[:, 1:], v, z)
    with pytest.raises(TypeError, match="q, k, v and z must be of one floating dtype"):
        channel_gate_loop(q, k, v, z.float())
    with pytest.raises(ValueError, match=r"mask must be \(b, n\) = \(2, 9\) bool"):
        channel_gate_loop(q, k, v, z, mask=torch.ones(2, 8, dtype=torch.bool))


@pytest.mark.parametrize("impl", ["auto", *FAST])
def test_an_empty_batch_gives_empty_outputs_and_gradients(impl: str) -> None:
    for n in (1, 7):
        q, k, v = (torch.randn(0, n, 5, requires_grad=True) for _ in range(3))
        z = torch.randn(0, n, 5, 2, requires_grad=True)
        out, state = channel_gate_loop(q, k, v, z, impl=impl)
        out.sum().backward()
        assert out.shape == q.grad.shape == (0, n, 5)
        assert state.shape == (0, 5)
