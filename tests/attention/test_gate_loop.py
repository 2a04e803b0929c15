"""Gate loop layers: constant state size, long sequences, invalid arguments."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor

from attention_zoo import BLOCKS, GateLoopAttention, RelativeGateAttention, SimpleGateLoop
from tests.formulas import relative_error


@pytest.mark.parametrize("name", ["gate_loop", "simple_gate_loop"])
def test_recurrent_state_has_constant_size(name: str) -> None:
    block = BLOCKS[name](16)
    with torch.no_grad():
        _, short = block.step(torch.randn(2, 3, 16))
        _, long = block.step(torch.randn(2, 500, 16), short)
    assert short.nbytes == long.nbytes
    assert (short.length, long.length) == (3, 503)


@pytest.mark.parametrize("heads", [None, 4])
def test_masked_tokens_leave_the_recurrent_state_unchanged(heads: int | None) -> None:
    block = GateLoopAttention(16, heads=heads)
    with torch.no_grad():
        _, state = block.step(torch.randn(2, 5, 16))
        _, later = block.step(torch.randn(2, 70, 16), state, mask=torch.zeros(2, 70, dtype=torch.bool))
    torch.testing.assert_close(later.hidden_state, state.hidden_state, rtol=1e-6, atol=0)


@pytest.mark.parametrize("sub_norm", [False, True])
def test_gate_loop_saves_at_most_seven_times_its_input_for_backward(sub_norm: bool) -> None:
    block, x = GateLoopAttention(64, sub_norm=sub_norm), torch.randn(1, 256, 64, requires_grad=True)
    known = {tensor.untyped_storage().data_ptr() for tensor in (x, *block.parameters())}
    kept = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = block(x)
    assert out.requires_grad
    assert 6.9 < sum(kept.values()) / x.nbytes < 7.1  # q, k, v, z twice as wide, what the loop gives, the swish gate


@pytest.mark.parametrize("heads", [None, 4])
def test_gate_loop_over_100_000_tokens_in_chunks_equals_one_pass(heads: int | None) -> None:
    block, x, state, pieces = GateLoopAttention(8, heads=heads), torch.randn(1, 100_000, 8), None, []
    with torch.no_grad():
        whole = block(x)
        for part in x.split(9973, 1):
            out, state = block.step(part, state)
            pieces.append(out)
    assert bool(whole.isfinite().all())
    assert relative_error(torch.cat(pieces, 1), whole) < 1e-5


def test_relative_gate_outputs_are_of_order_one_at_4096_tokens() -> None:
    with torch.no_grad():
        out = RelativeGateAttention(16, heads=1, dim_head=8).values_and_output(torch.randn(1, 4096, 16)).output
    assert 1e-3 < float(out.abs().max()) < 10


def test_gradient_fraction_scales_only_the_gradient_of_the_gates() -> None:
    grads = []
    for fraction in (1.0, 0.25):
        torch.manual_seed(0)
        block = GateLoopAttention(16, heads=4, gradient_fraction=fraction)
        block(torch.randn(2, 9, 16)).square().sum().backward()
        grads.append((block.to_a.weight.grad, block.to_k.weight.grad))
    torch.testing.assert_close(grads[1][0], 0.25 * grads[0][0])
    torch.testing.assert_close(grads[1][1], grads[0][1])


def test_real_gate_error_under_autocast_comes_from_rounding_inputs() -> None:
    block = GateLoopAttention(32, heads=8, gate="real", output_gate=None)
    x = torch.randn(3, 67, 32)
    rounded = copy.deepcopy(block)
    with torch.no_grad():
        for parameter in rounded.parameters():
            parameter.copy_(parameter.bfloat16())
        exact, rounded_exactly = block.double()(x.double()), rounded.double()(x.bfloat16().double())
        with torch.autocast("cpu", dtype=torch.bfloat16):
            got = block.float()(x)
    assert relative_error(got, rounded_exactly) < 1e-2
    assert relative_error(rounded_exactly, exact) > 2e-2  # the gate jumps from -1/2 to 1/2 where z changes its sign


@pytest.mark.parametrize("heads", [None, 4])
@torch.no_grad()
def test_a_reverse_gate_loop_follows_the_recurrence_from_the_last_token_to_the_first(heads: int | None) -> None:
    """h_t = a_t h_{t+1} + k_t v_t^T, y_t = q_t^T Re(h_t), token by token; a masked token leaves h unchanged."""
    block = GateLoopAttention(16, heads=heads, output_gate=None, reverse=True).double()
    x, mask = torch.randn(2, 70, 16, dtype=torch.float64), torch.rand(2, 70) < 0.7
    split = lambda t: t.unflatten(-1, (block.heads, -1))  # noqa: E731
    q, k, v = (split(to(x)) for to in (block.to_q, block.to_k, block.to_v))
    z = torch.view_as_complex(block.to_a(x).unflatten(-1, (block.heads, 2)).contiguous())
    gate = z.abs().sigmoid() * z / z.abs()
    state = torch.zeros(2, block.heads, block.dim_head, block.dim_head, dtype=torch.complex128)
    want = torch.zeros_like(v)
    for t in reversed(range(70)):
        new = gate[:, t, :, None, None] * state + k[:, t, :, :, None] * v[:, t, :, None, :]
        state = torch.where(mask[:, t, None, None, None], new, state)
        want[:, t] = torch.einsum("bhe,bhef->bhf", q[:, t], state.real)
    out = block(x, mask=mask)
    assert relative_error(out[mask], want.flatten(2)[mask]) < 1e-12


def test_gate_loop_layers_name_invalid_arguments() -> None:
    with pytest.raises(ValueError, match="heads must divide dim_inner, got heads=5, dim_inner=16"):
        GateLoopAttention(16, heads=5)
    with pytest.raises(ValueError, match=r"gradient_fraction must lie in \[0, 1\], got gradient_fraction=1.5"):
        GateLoopAttention(16, gradient_fraction=1.5)
    with pytest.raises(ValueError, match=r"dim_head must be even.*got dim_head=7"):
        RelativeGateAttention(16, dim_head=7)
    for reverse in (SimpleGateLoop(16, reverse=True), GateLoopAttention(16, reverse=True)):
        with pytest.raises(ValueError, match="step needs reverse=False, got reverse=True"):
            reverse.step(torch.randn(1, 2, 16))
