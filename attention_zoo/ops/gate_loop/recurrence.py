"""Elementwise linear recurrences by a two-level scan or by numba, with an explicit backward.

state_t = a_t state_{t-1} + x_t, real or complex

"scan" takes the steps of all chunks one after the other, then the chunks. "batched", for devices on which every step
costs a kernel launch, combines tokens at distance 1, 2, 4, ... instead, inside all chunks and then between them:
    (a, x)_t after (a, x)_s  =  (a_t a_s, a_t x_s + x_t)

Paper: GateLoop, https://arxiv.org/abs/2311.01927
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from attention_zoo.ops.custom_op import register_operator
from attention_zoo.ops.gate_loop.numba_kernels import recurrence_kernel

BATCHED = 16  # tokens of a chunk whose tokens are combined at once
WIDE = 2048  # features of a token, over the batch, from which single steps run at memory speed and the scan does not
HAS_NUMBA = importlib.util.find_spec("numba") is not None


class RecurrenceInputs(NamedTuple):
    """Inputs of the operator.

    a, x: (b, n, d), of one dtype, at least float32.
    state: initial state, (b, d).
    impl: "scan", "batched" or "numba".
    """

    a: Tensor
    x: Tensor
    state: Tensor
    impl: str


def fast_linear_recurrence(a: Tensor, x: Tensor, state: Tensor, impl: str) -> Tensor:
    """States of all tokens, (b, n, d); arguments as in `RecurrenceInputs`."""
    return _operator(RecurrenceInputs(a, x, state, impl))[0]


def elementwise_gate_loop(
    q: Tensor, k: Tensor, v: Tensor, gate: Tensor, state: Tensor, impl: str
) -> tuple[Tensor, Tensor]:
    """The gate loop of heads of size 1 and its final state; arguments as in `gate_loop`."""
    kv = (k * v).squeeze(-1).transpose(1, 2)  # (b, n, h)
    kv = torch.complex(kv, torch.zeros_like(kv))
    states = fast_linear_recurrence(gate.transpose(1, 2), kv, state[:, :, 0, 0], impl)
    return q * states.real.transpose(1, 2)[..., None], states[:, -1, :, None, None]


def recur(a: Tensor, x: Tensor, state: Tensor, impl: str) -> Tensor:
    """States of all tokens, a new (b, n, d) without autograd."""
    if impl == "numba":
        out = torch.empty_like(x, memory_format=torch.contiguous_format)
        tensors = (tensor.detach().contiguous().resolve_conj().resolve_neg() for tensor in (a, x, state))
        recurrence_kernel()(*(tensor.numpy() for tensor in tensors), out.numpy())
        return out
    if impl == "batched":
        return _batched_scan(a, x, state)
    b, n, d = x.shape
    if b * d < WIDE or x.device.type != "cpu":
        return _scan(a, x, state).clone()
    out = x.new_empty(x.shape)
    for t in range(n):
        state = torch.addcmul(x[:, t], a[:, t], state, out=out[:, t])
    return out


def recur_backward(grad_out: Tensor, a: Tensor, out: Tensor, state: Tensor, impl: str) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of a, x and the initial state: the same recurrence in reverse order."""
    a = a.conj().resolve_conj()
    next_gate = torch.cat((a[:, 1:], torch.ones_like(a[:, :1])), dim=1).flip(1)
    grad_x = recur(next_gate, grad_out.flip(1), torch.zeros_like(state), impl).flip(1)
    before = torch.cat((state[:, None], out[:, :-1]), dim=1)
    return grad_x * before.conj(), grad_x, a[:, 0] * grad_x[:, 0]


def _scan(a: Tensor, x: Tensor, state: Tensor) -> Tensor:
    """All chunks in parallel, each from a zero state; then the states between chunks, decayed by the gates so far."""
    b, n, d = x.shape
    size = math.isqrt(n - 1) + 1
    missing = -n % size
    if missing:
        a = torch.cat((a, a.new_ones(b, missing, d)), dim=1)
        x = torch.cat((x, x.new_zeros(b, missing, d)), dim=1)
    a, x = (tensor.view(b, tensor.shape[1] // size, size, d) for tensor in (a, x))  # (b, chunks, size, d)
    local, product = torch.empty_like(x), torch.empty_like(a)
    local[:, :, 0], product[:, :, 0] = x[:, :, 0], a[:, :, 0]
    for t in range(1, size):
        local[:, :, t] = torch.addcmul(x[:, :, t], a[:, :, t], local[:, :, t - 1])
        product[:, :, t] = a[:, :, t] * product[:, :, t - 1]
    for chunk in range(x.shape[1]):
        local[:, chunk] = torch.addcmul(local[:, chunk], product[:, chunk], state[:, None])
        state = local[:, chunk, -1]
    return local.flatten(1, 2)[:, :n]


def _batched_scan(a: Tensor, x: Tensor, state: Tensor) -> Tensor:
    """As `_scan`, in a number of operators that grows with the logarithm of the length."""
    b, n, d = x.shape
    size = min(BATCHED, n)
    missing = -n % size
    x = torch.cat((torch.addcmul(x[:, :1], a[:, :1], state[:, None]), x[:, 1:], x.new_zeros(b, missing, d)), dim=1)
    a = torch.cat((a, a.new_ones(b, missing, d)), dim=1)
    a, x = (tensor.view(b, (n + missing) // size, size, d) for tensor in (a, x))
    a, x = _combine(a, x, 2)
    before = _combine(a[:, :-1, -1], x[:, :-1, -1], 1)[1]  # the states before all chunks but the first
    out = torch.cat((x[:, :1], torch.addcmul(x[:, 1:], a[:, 1:], before[:, :, None])), dim=1)
    return out.flatten(1, 2)[:, :n].contiguous()


def _combine(a: Tensor, x: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """The products of the gates from the first token on, and the states from a zero state, along an axis."""
    n, shift = x.shape[dim], 1
    while shift < n:
        first, later, gate = (
            x.narrow(dim, 0, n - shift),
            x.narrow(dim, shift, n - shift),
            a.narrow(dim, shift, n - shift),
        )
        x = torch.cat((x.narrow(dim, 0, shift), torch.addcmul(later, gate, first)), dim=dim)
        a = torch.cat((a.narrow(dim, 0, shift), gate * a.narrow(dim, 0, n - shift)), dim=dim)
        shift *= 2
    return a, x


def _forward(inputs: RecurrenceInputs) -> list[Tensor]:
    return [recur(*inputs)]


def _backward(inputs: RecurrenceInputs, outputs: Sequence[Tensor], gradients: Sequence[Tensor]) -> Sequence[Tensor]:
    return recur_backward(gradients[0].resolve_conj(), inputs.a, outputs[0], inputs.state, inputs.impl)


def _fake(inputs: RecurrenceInputs) -> list[Tensor]:
    return [inputs.x.new_empty(inputs.x.shape)]


_operator = register_operator("linear_recurrence", RecurrenceInputs, _forward, _backward, _fake)
