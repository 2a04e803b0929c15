"""Elementwise linear recurrences: h_t = a_t h_{t-1} + x_t along a sequence, real or complex.

Paper: GateLoop, https://arxiv.org/abs/2311.01927
"""

from __future__ import annotations

import functools
import importlib.util
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from attention_zoo.ops.implementation import choose
from attention_zoo.ops.precision import at_least_float32, no_autocast

WIDE = 2048  # features of a token, over the batch, from which one step at a time is as fast as memory, and two are not
HAS_NUMBA = importlib.util.find_spec("numba") is not None


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
        impl: "reference" (a loop over the sequence, twice differentiable), "scan" (two levels of about sqrt(n) steps
            each, or one level where a single step is work enough), "numba" (one pass at memory speed, on the CPU, with
            the extra `fast`) or "auto" (numba where it can run, otherwise the scan). A second derivative of the last
            three raises.

    Returns:
        The recurrence's `out` and `state`.

    Raises:
        TypeError: a and x are not of one floating or complex dtype, or the state is of another than the recurrence's.
        ValueError: a and x differ in shape, are empty, or the state does not fit them; numba off the CPU.
        ImportError: impl="numba", and numba is not installed.
    """
    impl = choose(impl, ("scan", "numba"))
    _check(a, x, state)
    with no_autocast(x):
        gate, wide = at_least_float32(a), at_least_float32(x)
        start = wide.new_zeros(x.shape[0], x.shape[2]) if state is None else state
        out = _reference(gate, wide, start) if impl == "reference" else _fast(gate, wide, start, fast_impl(impl, x))
        return Recurrence(out.to(x.dtype), out[:, -1])


def fast_impl(impl: str, x: Tensor) -> str:
    """The fast way that runs for x: "scan" or "numba", for "auto" the better of those that can.

    Raises:
        ImportError: numba is asked for and not installed.
        ValueError: numba is asked for off the CPU.
    """
    if impl == "auto":
        return "numba" if x.device.type == "cpu" and HAS_NUMBA else "scan"
    if impl == "numba" and not HAS_NUMBA:
        raise ImportError("impl='numba' needs numba: pip install 'attention-zoo[fast]'")
    if impl == "numba" and x.device.type != "cpu":
        raise ValueError(f"impl='numba' runs on the CPU alone, got x on {x.device}")
    return impl


def recur(a: Tensor, x: Tensor, start: Tensor, impl: str) -> Tensor:
    """h_t for every token by "scan" or "numba", a fresh (b, n, d) without a gradient."""
    if impl == "numba":
        return _numba(a, x, start)
    b, n, d = x.shape
    if b * d < WIDE or x.device.type != "cpu":  # elsewhere every step costs the start of a kernel
        return _scan(a, x, start).clone()
    out = x.new_empty(x.shape)
    for t in range(n):
        start = torch.addcmul(x[:, t], a[:, t], start, out=out[:, t])
    return out


def recur_backward(to_out: Tensor, a: Tensor, out: Tensor, start: Tensor, impl: str) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of a, x and the start: the same recurrence run backwards."""
    a = a.conj().resolve_conj()
    later = torch.cat((a[:, 1:], torch.ones_like(a[:, :1])), dim=1).flip(1)  # the gate of the token after
    to_x = recur(later, to_out.flip(1), torch.zeros_like(start), impl).flip(1)
    before = torch.cat((start[:, None], out[:, :-1]), dim=1)
    return to_x * before.conj(), to_x, a[:, 0] * to_x[:, 0]


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


@torch.library.custom_op("attention_zoo::linear_recurrence", mutates_args=())
def _fast(a: Tensor, x: Tensor, start: Tensor, impl: str) -> Tensor:
    return recur(a, x, start, impl)


@torch.library.custom_op("attention_zoo::linear_recurrence_backward", mutates_args=())
def _fast_backward(to_out: Tensor, a: Tensor, out: Tensor, start: Tensor, impl: str) -> tuple[Tensor, Tensor, Tensor]:
    return recur_backward(to_out, a, out, start, impl)


@_fast.register_fake
def _(a: Tensor, x: Tensor, start: Tensor, impl: str) -> Tensor:
    return x.new_empty(x.shape)


@_fast_backward.register_fake
def _(to_out: Tensor, a: Tensor, out: Tensor, start: Tensor, impl: str) -> tuple[Tensor, Tensor, Tensor]:
    return a.new_empty(a.shape), out.new_empty(out.shape), start.new_empty(start.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    a, _, start, ctx.impl = inputs
    ctx.save_for_backward(a, output, start)


def _backward(ctx: Any, to_out: Tensor) -> tuple[Tensor | None, ...]:
    return *_fast_backward(to_out.resolve_conj(), *ctx.saved_tensors, ctx.impl), None


def _refuse(ctx: Any, *grads: Tensor) -> None:
    raise RuntimeError(
        "the fast linear recurrence has no second derivative: compute it inside `with attention_zoo.reference():`"
    )


_fast.register_autograd(_backward, setup_context=_save)
_fast_backward.register_autograd(_refuse)


def _numba(a: Tensor, x: Tensor, start: Tensor) -> Tensor:
    """One pass over time on the CPU with the features inside, as fast as memory delivers."""
    run = _kernel()
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    tensors = (tensor.detach().contiguous().resolve_conj().resolve_neg() for tensor in (a, x, start))
    run(*(tensor.numpy() for tensor in tensors), out.numpy())
    return out


@functools.cache
def _kernel() -> Callable[..., None]:
    import numba

    def run(a: Any, x: Any, start: Any, out: Any) -> None:
        b, n, d = x.shape
        for row in range(b):
            for c in range(d):
                out[row, 0, c] = a[row, 0, c] * start[row, c] + x[row, 0, c]
            for t in range(1, n):
                for c in range(d):
                    out[row, t, c] = a[row, t, c] * out[row, t - 1, c] + x[row, t, c]

    compiled: Callable[..., None] = numba.njit(run, nogil=True, fastmath={"contract"})
    return compiled


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
