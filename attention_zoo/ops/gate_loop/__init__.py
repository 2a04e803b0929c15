"""The gate loop: linear attention whose hidden state is multiplied by a complex, data-dependent gate before each token.

state_t = a_t state_{t-1} + k_t v_t^T,  y_t = q_t^T Re(state_t)

Paper: GateLoop, https://arxiv.org/abs/2311.01927
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from attention_zoo.ops.documents import Documents, to_documents
from attention_zoo.ops.gate_loop import recurrence
from attention_zoo.ops.gate_loop.channel import fused_channel_gate_loop
from attention_zoo.ops.gate_loop.chunked import chunked_gate_loop, decay
from attention_zoo.ops.gate_loop.gates import complex_of, gate_products, scale_gradient, unit_gate
from attention_zoo.ops.gate_loop.recurrence import HAS_NUMBA, elementwise_gate_loop, fast_linear_recurrence
from attention_zoo.ops.gate_loop.simple_gla import simple_gla_gate_loop
from attention_zoo.ops.implementation import choose
from attention_zoo.ops.precision import at_least_float32, no_autocast
from attention_zoo.ops.softmax import check_qkv

__all__ = [
    "HAS_NUMBA",
    "GateLoop",
    "channel_gate_loop",
    "complex_of",
    "gate_loop",
    "gate_loop_weights",
    "gate_products",
    "linear_recurrence",
    "scale_gradient",
    "unit_gate",
]


class GateLoop(NamedTuple):
    """Result of a gate loop or of a linear recurrence; shapes and dtypes are those that the function documents.

    out: outputs of all tokens.
    state: hidden state after the last token.
    """

    out: Tensor
    state: Tensor


def gate_loop(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gate: Tensor,
    *,
    state: Tensor | None = None,
    document_ids: Tensor | Documents | None = None,
    impl: str = "auto",
) -> GateLoop:
    """state_t = a_t state_{t-1} + k_t v_t^T, y_t = q_t^T Re(state_t), computed in at least float32.

    Time O(n (64 + e) e_v) and memory O(n e) per head; O(n) for heads of size 1, which run as an elementwise recurrence.
    The reference takes O(n e e_v) memory.

    Args:
        q, k, v: (b, h, n, e), (b, h, n, e), (b, h, n, e_v), floating point.
        gate: gates a, (b, h, n) complex with 0 <= |a| <= 1. A gate of exactly 0 resets the state.
        state: initial hidden state, (b, h, e, e_v), complex128 for float64 inputs, otherwise complex64. None: zeros.
        document_ids: (b, n) int, for packed rows: the state is reset at the start of every document, a maximal run of
            equal ids; see `Documents`.
        impl: "reference" (loop over time, twice differentiable), "chunked" (matrix products in chunks of 64 tokens, one
            group of chunks after the other), "batched" (those of all chunks at once, and one product for the states
            between chunks) or "auto": chunked on the CPU, otherwise batched, an elementwise recurrence for heads of
            size 1, and the equation itself for a single token. A second derivative of the others raises RuntimeError.
            "fla" is `chunk_simple_gla` of flash-linear-attention, which needs a GPU, computes products of matrices in
            the dtype of v, and has not been tested on one; the rounding error of its gradient of a gate grows with
            1 / |a|.

    Returns:
        `out` (b, h, n, e_v) in the dtype of v, and the final `state` (b, h, e, e_v), complex.

    Raises:
        TypeError: `gate` is not complex, or `state` has the wrong dtype.
        ValueError: shapes do not match, or n is 0.
        ImportError: impl="fla", and flash-linear-attention is not installed.
    """
    impl = choose(impl, ("chunked", "batched", "fla"))
    check_qkv(q, k, v)
    if not gate.is_complex():
        raise TypeError(f"gate must be complex, got dtype {gate.dtype}")
    if gate.shape != q.shape[:3] or q.shape[:3] != v.shape[:3] or not q.shape[2]:
        raise ValueError(
            f"gate must be (b, h, n) as q, k and v are, with n >= 1, got shapes {tuple(gate.shape)}, "
            f"{tuple(q.shape)} and {tuple(v.shape)}"
        )
    if document_ids is not None:
        gate = gate.masked_fill(to_documents(document_ids, q[:, 0]).starts[:, None], 0.0)
    dtype = complex_of(q.dtype)
    state = _initial_state(state, "(b, h, e, e_v)", (*q.shape[:2], q.shape[3], v.shape[3]), dtype, q.device)
    with no_autocast(q):
        args = at_least_float32(q), at_least_float32(k), at_least_float32(v), gate.to(dtype), state
        if impl == "reference":
            from attention_zoo.ops.gate_loop.reference import gate_loop_reference

            out, state = gate_loop_reference(*args)
        elif impl == "fla":
            out, state = simple_gla_gate_loop(*args, v.dtype)
        elif impl == "auto" and q.shape[2] == 1:  # a decoding step
            state = args[3][..., None] * state + args[1].transpose(-1, -2) @ args[2]
            out = args[0] @ state.real
        elif impl == "auto" and q.shape[3] == v.shape[3] == 1:
            out, state = elementwise_gate_loop(*args, _fast_impl("auto", q))
        else:
            out, state = chunked_gate_loop(*args, _chunked_impl(impl, q))
        return GateLoop(out.to(v.dtype), state)


def channel_gate_loop(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    z: Tensor,
    *,
    mask: Tensor | None = None,
    state: Tensor | None = None,
    document_ids: Tensor | Documents | None = None,
    impl: str = "auto",
) -> GateLoop:
    """Gate loop over heads of size 1, including the gates, computed in at least float32.

    state_t = a_t state_{t-1} + k_t v_t,  y_t = q_t Re(state_t),  a_t = sigma(|z_t|) e^{i arg z_t}

    Time and memory O(n d); only the inputs are saved for backward.

    Args:
        q, k, v: (b, n, d), floating point.
        z: pre-activation of the gates, (b, n, d, 2) for real and imaginary part, in the dtype of q. The gate is 0.5 at
            z = 0, where its gradient is 0.
        mask: (b, n) bool, True = a valid token. Masked tokens leave the state unchanged.
        state: initial hidden state, (b, d), complex128 for float64 inputs, otherwise complex64. None: zeros.
        document_ids: (b, n) int; see `gate_loop`.
        impl: "reference" (loop over time, twice differentiable), "scan" (torch operators), "batched" (torch operators,
            whose number grows with the logarithm of the length), "numba" (a single pass on the CPU; requires the extra
            `fast`) or "auto" (on the CPU numba where it is available, otherwise the scan; batched on other devices). A
            second derivative of the fast implementations raises RuntimeError.

    Returns:
        `out` (b, n, d) in the dtype of v, and the final `state` (b, d), complex.

    Raises:
        TypeError: dtypes do not match, or are not floating point.
        ValueError: shapes do not match, n is 0, or impl="numba" with tensors that are not on the CPU.
        ImportError: impl="numba", and numba is not installed.
    """
    impl = choose(impl, ("scan", "batched", "numba"))
    if not q.is_floating_point() or not q.dtype == k.dtype == v.dtype == z.dtype:
        raise TypeError(f"q, k, v and z must be of one floating dtype, got {q.dtype}, {k.dtype}, {v.dtype}, {z.dtype}")
    if q.ndim != 3 or not q.shape == k.shape == v.shape or not q.shape[1]:
        shapes = ", ".join(str(tuple(tensor.shape)) for tensor in (q, k, v))
        raise ValueError(f"q, k and v must be (b, n, d) with n >= 1, got shapes {shapes}")
    if z.shape != (*q.shape, 2):
        raise ValueError(f"z must be (b, n, d, 2) = {(*q.shape, 2)}, got shape {tuple(z.shape)}")
    if mask is not None and (mask.dtype != torch.bool or mask.shape != q.shape[:2]):
        raise ValueError(f"mask must be (b, n) = {tuple(q.shape[:2])} bool, got {tuple(mask.shape)} {mask.dtype}")
    starts = None if document_ids is None else to_documents(document_ids, q).starts
    state = _initial_state(state, "(b, d)", (q.shape[0], q.shape[2]), complex_of(q.dtype), q.device)
    with no_autocast(q):
        if impl != "reference":
            return GateLoop(*fused_channel_gate_loop(q, k, v, z, mask, starts, state, _fast_impl(impl, q)))
        from attention_zoo.ops.gate_loop.reference import channel_gate_loop_reference

        q, k, wide, z = at_least_float32(q), at_least_float32(k), at_least_float32(v), at_least_float32(z)
        out, state = channel_gate_loop_reference(q, k, wide, z, mask, starts, state)
        return GateLoop(out.to(v.dtype), state)


def linear_recurrence(
    a: Tensor,
    x: Tensor,
    *,
    state: Tensor | None = None,
    document_ids: Tensor | Documents | None = None,
    impl: str = "auto",
) -> GateLoop:
    """state_t = a_t state_{t-1} + x_t for each feature, computed in at least float32.

    Time and memory O(n d); a and the states are saved for backward.

    Args:
        a: gates, (b, n, d) with |a| <= 1. A gate of exactly 0 resets the state.
        x: (b, n, d), in the dtype of a: floating point or complex.
        state: initial hidden state, (b, d), in the dtype of x, float32 for half precision. None: zeros.
        document_ids: (b, n) int; see `gate_loop`.
        impl: "reference" (loop over time, twice differentiable), "scan" (two levels of about sqrt(n) steps each, or a
            single level where one step is enough work), "batched" (torch operators whose number grows with the
            logarithm of the length), "numba" (a single pass on the CPU; requires the extra `fast`) or "auto" (on the
            CPU numba where it is available, otherwise the scan; batched on other devices). A second derivative of the
            fast implementations raises RuntimeError.

    Returns:
        `out` (b, n, d), the states of all tokens in the dtype of x, and the final `state` (b, d).

    Raises:
        TypeError: a and x are not of one floating or complex dtype, or `state` has the wrong dtype.
        ValueError: shapes do not match, n is 0, or impl="numba" with tensors that are not on the CPU.
        ImportError: impl="numba", and numba is not installed.
    """
    impl = choose(impl, ("scan", "batched", "numba"))
    if a.dtype != x.dtype or not (x.is_floating_point() or x.is_complex()):
        raise TypeError(f"a and x must be of one floating or complex dtype, got {a.dtype} and {x.dtype}")
    if x.ndim != 3 or a.shape != x.shape or not x.shape[1]:
        raise ValueError(f"a and x must be (b, n, d) with n >= 1, got shapes {tuple(a.shape)} and {tuple(x.shape)}")
    if document_ids is not None:
        a = a.masked_fill(to_documents(document_ids, x).starts[..., None], 0.0)
    a, wide = at_least_float32(a), at_least_float32(x)
    state = _initial_state(state, "(b, d)", (x.shape[0], x.shape[2]), wide.dtype, x.device)
    with no_autocast(x):
        if impl == "reference":
            from attention_zoo.ops.gate_loop.reference import linear_recurrence_reference

            out = linear_recurrence_reference(a, wide, state)
        else:
            out = fast_linear_recurrence(a, wide, state, _fast_impl(impl, x))
        return GateLoop(out.to(x.dtype), out[:, -1])


def gate_loop_weights(q: Tensor, k: Tensor, gate: Tensor, *, document_ids: Tensor | Documents | None = None) -> Tensor:
    """Weights of the gate loop on the values, (b, h, i, j): (q_i k_j) Re(a_{j+1} ... a_i), 0 for j > i."""
    if document_ids is not None:
        gate = gate.masked_fill(to_documents(document_ids, q[:, 0]).starts[:, None], 0.0)
    with no_autocast(q):
        scores = at_least_float32(q) @ at_least_float32(k).transpose(-1, -2)
        weights = scores * decay(torch.view_as_real(gate.to(complex_of(q.dtype))), _chunked_impl("auto", q))
    return weights.to(q.dtype)


def _initial_state(
    state: Tensor | None, axes: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> Tensor:
    if state is None:
        return torch.zeros(shape, dtype=dtype, device=device)
    if not isinstance(state, Tensor):
        raise TypeError(f"state must be a tensor, got {type(state).__name__}")
    if state.shape != shape:
        raise ValueError(f"state must be {axes} = {shape}, got shape {tuple(state.shape)}")
    if state.device != device:
        raise ValueError(f"state must be on the device of the inputs, {device}, got {state.device}")
    if state.dtype != dtype:
        raise TypeError(f"state must be of dtype {dtype}, in which the recurrence is computed, got {state.dtype}")
    return state


def _chunked_impl(impl: str, q: Tensor) -> str:
    """Resolve "auto": on a GPU, a loop over chunks takes longer to launch than to run."""
    return impl if impl != "auto" else "chunked" if q.device.type == "cpu" else "batched"


def _fast_impl(impl: str, x: Tensor) -> str:
    """Resolve "auto" to "numba", "scan" or "batched", and check that numba can run."""
    on_cpu = x.device.type == "cpu"
    if impl == "auto":
        return "batched" if not on_cpu else "numba" if recurrence.HAS_NUMBA else "scan"
    if impl == "numba" and not recurrence.HAS_NUMBA:
        raise ImportError("impl='numba' needs numba: pip install 'attention-zoo[fast]'")
    if impl == "numba" and not on_cpu:
        raise ValueError(f"impl='numba' requires tensors on the CPU, got x on {x.device}")
    return impl
