"""Elementwise linear recurrences: h_t = a_t h_{t-1} + x_t along a sequence, real or complex.

Paper: GateLoop, https://arxiv.org/abs/2311.01927
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from attention_zoo.ops.implementation import choose
from attention_zoo.ops.precision import at_least_float32, no_autocast


class Recurrence(NamedTuple):
    """What a recurrence gives.

    out: (b, n, d), h_t after every token, in the dtype of x.
    state: (b, d), h_t after the last token, in at least float32.
    """

    out: Tensor
    state: Tensor


def linear_recurrence(a: Tensor, x: Tensor, *, state: Tensor | None = None, impl: str = "auto") -> Recurrence:
    """h_t = a_t h_{t-1} + x_t for every feature by itself, in at least float32. A gate of exactly 0 is a hard reset.

    Time and memory O(n d); backward keeps a and h.

    Args:
        a: (b, n, d) gates with |a| <= 1.
        x: (b, n, d) inputs; complex where a is.
        state: (b, d), h before the first token, in the dtype in which the recurrence runs. None: 0.
        impl: "auto", "reference" (a loop over the sequence, twice differentiable) or "scan" (two levels of about
            sqrt(n) steps each; a second derivative raises).

    Returns:
        The recurrence's `out` and `state`.

    Raises:
        TypeError: a and x are not of one floating or complex dtype, or the state is of another than the recurrence's.
        ValueError: a and x differ in shape, are empty, or the state does not fit them.
    """
    impl = choose(impl, ("scan",))
    _check(a, x, state)
    with no_autocast(x):
        gate, wide = at_least_float32(a), at_least_float32(x)
        start = wide.new_zeros(x.shape[0], x.shape[2]) if state is None else state
        run = _reference if impl == "reference" else _Scan.apply
        out = run(gate, wide, start)
        return Recurrence(out.to(x.dtype), out[:, -1])


def _reference(a: Tensor, x: Tensor, h: Tensor) -> Tensor:
    outs = []
    for t in range(x.shape[1]):
        h = a[:, t] * h + x[:, t]
        outs.append(h)
    return torch.stack(outs, dim=1)


def _scan(a: Tensor, x: Tensor, start: Tensor) -> Tensor:
    """Chunks side by side, each from 0; then what every chunk hands on to the next, weighed by its gates so far."""
    b, n, d = x.shape
    size = math.isqrt(n - 1) + 1
    missing = -n % size
    if missing:
        a = torch.cat((a, a.new_ones(b, missing, d)), dim=1)
        x = torch.cat((x, x.new_zeros(b, missing, d)), dim=1)
    a, x = (tensor.view(b, -1, size, d) for tensor in (a, x))  # (b, chunks, size, d)
    local, product = torch.empty_like(x), torch.empty_like(a)
    local[:, :, 0], product[:, :, 0] = x[:, :, 0], a[:, :, 0]
    for t in range(1, size):
        local[:, :, t] = torch.addcmul(x[:, :, t], a[:, :, t], local[:, :, t - 1])
        product[:, :, t] = a[:, :, t] * product[:, :, t - 1]
    for chunk in range(x.shape[1]):
        local[:, chunk] = torch.addcmul(local[:, chunk], product[:, chunk], start[:, None])
        start = local[:, chunk, -1]
    return local.reshape(b, -1, d)[:, :n]


class _Scan(torch.autograd.Function):
    """The gradient of a linear recurrence is the same recurrence run backwards."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, x: Tensor, start: Tensor) -> Tensor:
        out = _scan(a, x, start)
        ctx.save_for_backward(a, out, start)
        return out

    @staticmethod
    def backward(ctx: Any, to_out: Tensor) -> Any:
        return _ScanBackward.apply(*ctx.saved_tensors, to_out)  # type: ignore[no-untyped-call]


class _ScanBackward(torch.autograd.Function):
    """A node of its own, joined to its inputs: once_differentiable cuts them off, and allow_unused then hides that."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, out: Tensor, start: Tensor, to_out: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        a = a.conj().resolve_conj()
        later = torch.cat((a[:, 1:], torch.ones_like(a[:, :1])), dim=1).flip(1)  # the gate of the token after
        to_x = _scan(later, to_out.flip(1), torch.zeros_like(start)).flip(1)
        before = torch.cat((start[:, None], out[:, :-1]), dim=1)
        return to_x * before.conj(), to_x, a[:, 0] * to_x[:, 0]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        raise RuntimeError("the scan has no second derivative: use attention_zoo.reference() or impl='reference'")


def _check(a: Tensor, x: Tensor, state: Tensor | None) -> None:
    if a.dtype != x.dtype or not (x.is_floating_point() or x.is_complex()):
        raise TypeError(f"a and x must be of one floating or complex dtype, got {a.dtype} and {x.dtype}")
    if x.ndim != 3 or a.shape != x.shape or not x.shape[1]:
        raise ValueError(f"a and x must be (b, n, d) with n >= 1, got shapes {tuple(a.shape)} and {tuple(x.shape)}")
    if state is None:
        return
    if state.shape != (x.shape[0], x.shape[2]):
        raise ValueError(f"state must be (b, d) = {(x.shape[0], x.shape[2])}, got shape {tuple(state.shape)}")
    runs_in = torch.float32 if x.dtype in (torch.float16, torch.bfloat16) else x.dtype
    if state.dtype != runs_in:
        raise TypeError(f"state must be of dtype {runs_in}, in which the recurrence runs, got {state.dtype}")
