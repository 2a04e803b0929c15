"""The gate loop over heads of size 1 as one operator, from the projections to the output.

Only the inputs are saved for backward, which recomputes gates and states.

Paper: GateLoop, https://arxiv.org/abs/2311.01927
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from attention_zoo.ops.custom_op import register_operator
from attention_zoo.ops.gate_loop.gates import unit_gate, unit_gate_gradient
from attention_zoo.ops.gate_loop.numba_kernels import gate_loop_kernels
from attention_zoo.ops.gate_loop.recurrence import recur, recur_backward
from attention_zoo.ops.precision import at_least_float32

PIECE = 2**17  # gates that "scan" computes at a time, so that they stay in the cache of a CPU


class ChannelInputs(NamedTuple):
    """Inputs of the operator.

    q, k, v: (b, n, d); z: (b, n, d, 2); all of one floating dtype.
    mask: (b, n) bool, True = a valid token.
    starts: (b, n) bool, True = a token before which the state is reset.
    state: initial state, (b, d) complex.
    impl: "scan", "batched" or "numba".
    """

    q: Tensor
    k: Tensor
    v: Tensor
    z: Tensor
    mask: Tensor | None
    starts: Tensor | None
    state: Tensor
    impl: str


def fused_channel_gate_loop(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    z: Tensor,
    mask: Tensor | None,
    starts: Tensor | None,
    state: Tensor,
    impl: str,
) -> list[Tensor]:
    """The outputs (b, n, d) and the final state (b, d); arguments as in `ChannelInputs`."""
    return _operator(ChannelInputs(q, k, v, z, mask, starts, state, impl))


def _forward(inputs: ChannelInputs) -> tuple[Tensor, Tensor]:
    q, k, v, z = (at_least_float32(tensor) for tensor in inputs[:4])
    mask, starts, state, dtype = inputs.mask, inputs.starts, inputs.state, inputs.v.dtype
    if inputs.impl == "numba":
        planes, out = _planes(state), torch.empty_like(q, memory_format=torch.contiguous_format)
        kernels = gate_loop_kernels(q.dtype == torch.float64)
        kernels.forward(*_arrays(q, k, v, z), _mask_array(mask), _mask_array(starts), planes.numpy(), out.numpy())
        return out.to(dtype), torch.complex(*planes.unbind(1))
    out, state = v.new_empty(v.shape, dtype=dtype), state.clone()
    size = max(1, PIECE // max(1, q.shape[0] * q.shape[2])) if inputs.impl == "scan" else q.shape[1]
    for start in range(0, q.shape[1], size):
        part = slice(start, start + size)
        valid, reset = (None if tokens is None else tokens[:, part] for tokens in (mask, starts))
        states = recur(*_gates_and_inputs(k[:, part], v[:, part], z[:, part], valid, reset), state, inputs.impl)
        out[:, part] = q[:, part] * states.real
        state = states[:, -1].clone()
    return out, state


def _backward(inputs: ChannelInputs, outputs: Sequence[Tensor], gradients: Sequence[Tensor]) -> Sequence[Tensor]:
    grad_out, q, k, v, z = (at_least_float32(tensor) for tensor in (gradients[0], *inputs[:4]))
    grad_state = gradients[1]
    if inputs.impl != "numba":
        return _scan_backward(grad_out, grad_state, q, k, v, z, inputs.mask, inputs.starts, inputs.state, inputs.impl)
    planes = _planes(grad_state)
    grads = [torch.empty_like(tensor, memory_format=torch.contiguous_format) for tensor in (q, k, v, z)]
    gate_loop_kernels(q.dtype == torch.float64).backward(
        *_arrays(grad_out, q, k, v, z), _mask_array(inputs.mask), _mask_array(inputs.starts),
        _planes(inputs.state).numpy(), *_arrays(*grads), planes.numpy(),
    )  # fmt: skip
    return *grads, torch.complex(*planes.unbind(1))


def _scan_backward(
    grad_out: Tensor,
    grad_state: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    z: Tensor,
    mask: Tensor | None,
    starts: Tensor | None,
    state: Tensor,
    impl: str,
) -> tuple[Tensor, ...]:
    gate, kv = _gates_and_inputs(k, v, z, mask, starts)
    states = recur(gate, kv, state, impl)
    grad_states = torch.complex(q * grad_out, torch.zeros_like(q))
    grad_states[:, -1] += grad_state
    grad_gate, grad_kv, grad_state = recur_backward(grad_states, gate, states, state, impl)
    grad_kv = grad_kv.real
    if mask is not None:
        grad_kv = grad_kv.masked_fill(~mask[..., None], 0.0)
        grad_gate = grad_gate.masked_fill(~mask[..., None], 0.0)
    if starts is not None:
        grad_gate = grad_gate.masked_fill(starts[..., None], 0.0)
    return grad_out * states.real, v * grad_kv, k * grad_kv, unit_gate_gradient(z, grad_gate), grad_state


def _fake(inputs: ChannelInputs) -> list[Tensor]:
    return [tensor.new_empty(tensor.shape) for tensor in (inputs.v, inputs.state)]


_operator = register_operator(
    "channel_gate_loop", ChannelInputs, _forward, _backward, _fake, differentiable_outputs=2, save_outputs=False
)


def _gates_and_inputs(
    k: Tensor, v: Tensor, z: Tensor, mask: Tensor | None, starts: Tensor | None
) -> tuple[Tensor, Tensor]:
    """a and k v, (b, n, d) complex; 1 and 0 at masked tokens, and a is 0 where the state is reset."""
    gate, kv = unit_gate(z), k * v
    if mask is not None:
        gate = torch.where(mask[..., None], gate, torch.ones_like(gate))
        kv = kv.masked_fill(~mask[..., None], 0.0)
    if starts is not None:
        gate = gate.masked_fill(starts[..., None], 0.0)
    return gate, torch.complex(kv, torch.zeros_like(kv))


def _arrays(*tensors: Tensor) -> list[Any]:
    """Tensors (b, n, d), or (b, n, d, 2) with the last two axes flattened, as arrays for numba."""
    return [tensor.detach().contiguous().flatten(2).numpy() for tensor in tensors]


def _planes(state: Tensor) -> Tensor:
    """A complex state (b, d) as a new (b, 2, d): real, then imaginary part."""
    return torch.stack((state.real, state.imag), dim=1)


def _mask_array(mask: Tensor | None) -> Any:
    return (torch.ones(0, 0, dtype=torch.bool) if mask is None else mask.contiguous()).numpy()
