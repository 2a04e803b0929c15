"""The gate loop of heads of size 1, gates included: each channel has a complex gate and one number of memory.

h_t = a_t h_{t-1} + k_t v_t,  y_t = q_t Re(h_t),  a_t = sigma(|z_t|) e^{i arg z_t}

One op from the projections to the output, which keeps only its inputs for backward and computes gates and memories
again.

Paper: GateLoop, https://arxiv.org/abs/2311.01927
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from attention_zoo.ops.gate_loop.gates import complex_of, unit_gate, unit_gate_gradient
from attention_zoo.ops.gate_loop.numba_kernels import kernels
from attention_zoo.ops.gate_loop.recurrence import fast_impl, linear_recurrence, recur, recur_backward
from attention_zoo.ops.implementation import choose
from attention_zoo.ops.precision import at_least_float32, no_autocast

PIECE = 2**17  # gates that plain torch computes at a time on the CPU, for its caches


class ChannelGateLoop(NamedTuple):
    """What a gate loop over channels gives.

    out: (b, n, d), y_t for every token, in the dtype of v.
    state: (b, d) complex, h_t after the last token, in at least complex64.
    """

    out: Tensor
    state: Tensor


def channel_gate_loop(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    z: Tensor,
    *,
    mask: Tensor | None = None,
    state: Tensor | None = None,
    impl: str = "auto",
) -> ChannelGateLoop:
    """h_t = a_t h_{t-1} + k_t v_t, y_t = q_t Re(h_t), a_t = sigma(|z_t|) e^{i arg z_t}, in at least float32.

    Time and memory O(n d); backward keeps the inputs alone.

    Args:
        q, k, v: (b, n, d), floating.
        z: (b, n, d, 2), real and imaginary part, in the dtype of q; the gate is 0.5 at z = 0.
        mask: (b, n) bool, True = a real token. Others leave h unchanged.
        state: (b, d) complex, h before the first token. None: 0.
        impl: "reference" (the recurrence itself, twice differentiable), "scan" (plain torch), "numba" (one pass over
            memory, on the CPU, with the extra `fast`) or "auto" (numba where it can run, otherwise the scan). A second
            derivative of the last three raises.

    Returns:
        The loop's `out` and `state`.

    Raises:
        TypeError: a dtype does not fit.
        ValueError: a shape does not fit; numba off the CPU.
        ImportError: impl="numba", and numba is not installed.
    """
    impl = choose(impl, ("scan", "numba"))
    _check(q, k, v, z, mask, state)
    dtype = complex_of(q.dtype)
    start = torch.zeros(q.shape[0], q.shape[2], dtype=dtype, device=q.device) if state is None else state
    with no_autocast(q):
        if impl == "reference":
            q, k, wide = at_least_float32(q), at_least_float32(k), at_least_float32(v)
            gate, written = _gates_and_inputs(k, wide, z, mask)
            h, last = linear_recurrence(gate, written, state=start)
            return ChannelGateLoop((q * h.real).to(v.dtype), last)
        out, last = _fast(q, k, v, z, mask, start, fast_impl(impl, q))
        return ChannelGateLoop(out, last)


def _gates_and_inputs(k: Tensor, v: Tensor, z: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """a and k v, (b, n, d) complex, 1 and 0 at masked tokens."""
    gate, written = unit_gate(z), k * v
    if mask is not None:
        gate = torch.where(mask[..., None], gate, torch.ones_like(gate))
        written = written.masked_fill(~mask[..., None], 0.0)
    return gate, torch.complex(written, torch.zeros_like(written))


@torch.library.custom_op("attention_zoo::channel_gate_loop", mutates_args=())
def _fast(
    q: Tensor, k: Tensor, v: Tensor, z: Tensor, mask: Tensor | None, start: Tensor, impl: str
) -> tuple[Tensor, Tensor]:
    q, k, wide, z = (at_least_float32(tensor) for tensor in (q, k, v, z))
    if impl == "numba":
        memory, out = _planes(start), torch.empty_like(q, memory_format=torch.contiguous_format)
        kernels(q.dtype == torch.float64).forward(*_arrays(q, k, wide, z), _mask(mask), memory.numpy(), out.numpy())
        return out.to(v.dtype), torch.complex(*memory.unbind(1))
    out, last = v.new_empty(v.shape), start.clone()
    tokens = max(1, PIECE // (q.shape[0] * q.shape[2])) if q.device.type == "cpu" else q.shape[1]
    for first in range(0, q.shape[1], tokens):
        here = slice(first, first + tokens)
        seen = None if mask is None else mask[:, here]
        h = recur(*_gates_and_inputs(k[:, here], wide[:, here], z[:, here], seen), last, impl)
        out[:, here] = q[:, here] * h.real
        last = h[:, -1].clone()
    return out, last


@torch.library.custom_op("attention_zoo::channel_gate_loop_backward", mutates_args=())
def _fast_backward(
    to_out: Tensor,
    to_state: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    z: Tensor,
    mask: Tensor | None,
    start: Tensor,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    dtype = v.dtype
    to_out, q, k, v, z = (at_least_float32(tensor) for tensor in (to_out, q, k, v, z))
    grads: tuple[Tensor, ...]
    if impl == "numba":
        to_start = _planes(to_state)
        grads = tuple(torch.empty_like(tensor, memory_format=torch.contiguous_format) for tensor in (q, k, v, z))
        arrays = (*_arrays(to_out, q, k, v, z), _mask(mask), _planes(start).numpy(), *_arrays(*grads))
        kernels(q.dtype == torch.float64).backward(*arrays, to_start.numpy())
        to_start = torch.complex(*to_start.unbind(1))
    else:
        grads, to_start = _scan_backward(to_out, to_state, q, k, v, z, mask, start)
    to_q, to_k, to_v, to_z = (tensor.to(dtype) for tensor in grads)
    return to_q, to_k, to_v, to_z, to_start


def _scan_backward(
    to_out: Tensor, to_state: Tensor, q: Tensor, k: Tensor, v: Tensor, z: Tensor, mask: Tensor | None, start: Tensor
) -> tuple[tuple[Tensor, ...], Tensor]:
    """The gradients of q, k, v and z, and of the start, in plain torch."""
    gate, written = _gates_and_inputs(k, v, z, mask)
    h = recur(gate, written, start, "scan")
    to_q, to_h = to_out * h.real, torch.complex(q * to_out, torch.zeros_like(q))
    to_h[:, -1] += to_state
    to_gate, to_h, to_start = recur_backward(to_h, gate, h, start, "scan")
    to_written = to_h.real
    if mask is not None:
        to_written = to_written.masked_fill(~mask[..., None], 0.0)
        to_gate = to_gate.masked_fill(~mask[..., None], 0.0)
    return (to_q, v * to_written, k * to_written, unit_gate_gradient(z, to_gate)), to_start


def _arrays(*tensors: Tensor) -> list[Any]:
    """Tensors (b, n, d), or (b, n, d, 2) with the last two axes as one, for the loops of numba."""
    return [tensor.detach().contiguous().flatten(2).numpy() for tensor in tensors]


def _planes(memory: Tensor) -> Tensor:
    """A fresh (b, 2, d) of a memory (b, d): real over imaginary parts."""
    return torch.stack((memory.real, memory.imag), dim=1)


def _mask(mask: Tensor | None) -> Any:
    return (torch.ones(0, 0, dtype=torch.bool) if mask is None else mask.contiguous()).numpy()


@_fast.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, z: Tensor, mask: Tensor | None, start: Tensor, impl: str
) -> tuple[Tensor, Tensor]:
    return v.new_empty(v.shape), start.new_empty(start.shape)


@_fast_backward.register_fake
def _(
    to_out: Tensor,
    to_state: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    z: Tensor,
    mask: Tensor | None,
    start: Tensor,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    return (*(tensor.new_empty(tensor.shape) for tensor in (q, k, v, z)), start.new_empty(start.shape))  # type: ignore[return-value]


def _save(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    *tensors, ctx.impl = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx: Any, to_out: Tensor, to_state: Tensor) -> tuple[Tensor | None, ...]:
    with no_autocast(to_out):
        to_q, to_k, to_v, to_z, to_start = _fast_backward(to_out, to_state, *ctx.saved_tensors, ctx.impl)
    return to_q, to_k, to_v, to_z, None, to_start, None


def _refuse(ctx: Any, *grads: Tensor) -> None:
    raise RuntimeError(
        "the fast gate loop over channels has no second derivative: compute it inside `with attention_zoo.reference():`"
    )


_fast.register_autograd(_backward, setup_context=_save)
_fast_backward.register_autograd(_refuse)


def _check(q: Tensor, k: Tensor, v: Tensor, z: Tensor, mask: Tensor | None, state: Tensor | None) -> None:
    if not q.is_floating_point() or not q.dtype == k.dtype == v.dtype == z.dtype:
        raise TypeError(f"q, k, v and z must be of one floating dtype, got {q.dtype}, {k.dtype}, {v.dtype}, {z.dtype}")
    if q.ndim != 3 or not q.shape == k.shape == v.shape or not q.shape[1]:
        shapes = ", ".join(str(tuple(tensor.shape)) for tensor in (q, k, v))
        raise ValueError(f"q, k and v must be (b, n, d) with n >= 1, got shapes {shapes}")
    if z.shape != (*q.shape, 2):
        raise ValueError(f"z must be (b, n, d, 2) = {(*q.shape, 2)}, got shape {tuple(z.shape)}")
    if mask is not None and (mask.dtype != torch.bool or mask.shape != q.shape[:2]):
        raise ValueError(f"mask must be (b, n) = {tuple(q.shape[:2])} bool, got {tuple(mask.shape)} {mask.dtype}")
    if state is None:
        return
    want = (q.shape[0], q.shape[2])
    if state.shape != want:
        raise ValueError(f"state must be (b, d) = {want}, got shape {tuple(state.shape)}")
    if state.dtype != complex_of(q.dtype):
        raise TypeError(f"state must be of dtype {complex_of(q.dtype)}, in which the gate loop runs, got {state.dtype}")
