"""The gate loop: linear attention whose memory is turned and shrunk by a complex gate before every token.

h_t = a_t h_{t-1} + k_t v_t^T,  y_t = q_t^T Re(h_t)

Paper: GateLoop, https://arxiv.org/abs/2311.01927
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from attention_zoo.ops.gate_loop.channel import channel_gate_loop
from attention_zoo.ops.gate_loop.chunked import chunked_gate_loop, decay
from attention_zoo.ops.gate_loop.gates import complex_of, unit_gate
from attention_zoo.ops.gate_loop.recurrence import linear_recurrence
from attention_zoo.ops.implementation import choose
from attention_zoo.ops.precision import at_least_float32, no_autocast
from attention_zoo.ops.softmax import check_heads

__all__ = ["GateLoop", "channel_gate_loop", "gate_loop", "gate_loop_weights", "linear_recurrence", "unit_gate"]


class GateLoop(NamedTuple):
    """What a gate loop gives.

    out: (b, h, n, e_v), y_t for every token, in the dtype of v.
    state: (b, h, e, e_v) complex, h_t after the last token, in at least complex64.
    """

    out: Tensor
    state: Tensor


def gate_loop(
    q: Tensor, k: Tensor, v: Tensor, gate: Tensor, *, state: Tensor | None = None, impl: str = "auto"
) -> GateLoop:
    """h_t = a_t h_{t-1} + k_t v_t^T, y_t = q_t^T Re(h_t), in at least float32.

    Time O(n (64 + e) e_v) per head, memory O(n e); heads of size 1 run as an elementwise recurrence.

    Args:
        q, k, v: (b, h, n, e), (b, h, n, e), (b, h, n, e_v), floating.
        gate: (b, h, n) complex with 0 <= |a| <= 1; exactly 0 is a hard reset.
        state: (b, h, e, e_v) complex, h before the first token. None: 0.
        impl: "auto", "reference" (the recurrence itself) or "chunked".

    Returns:
        The gate loop's `out` and `state`.

    Raises:
        TypeError: a dtype does not fit.
        ValueError: a shape does not fit.
    """
    impl = choose(impl, ("chunked",))
    check_heads(q, k, v)
    _check(q, v, gate, state)
    with no_autocast(q):
        q, k, wide = at_least_float32(q), at_least_float32(k), at_least_float32(v)
        dtype = complex_of(q.dtype)
        gate = gate.to(dtype)
        if state is None:
            state = torch.zeros(*q.shape[:2], q.shape[3], v.shape[3], dtype=dtype, device=q.device)
        if impl == "reference":
            out, state = _reference(q, k, wide, gate, state)
        elif impl == "auto" and q.shape[3] == v.shape[3] == 1:
            out, state = _elementwise(q, k, wide, gate, state)
        else:
            pairs = torch.view_as_real(state)
            stacked = torch.cat((pairs[..., 0], pairs[..., 1]), dim=-2)  # (b, h, 2e, e_v)
            out, stacked = chunked_gate_loop(q, k, wide, torch.view_as_real(gate), stacked)
            state = torch.complex(*stacked.chunk(2, dim=-2))
        return GateLoop(out.to(v.dtype), state)


def gate_loop_weights(q: Tensor, k: Tensor, gate: Tensor) -> Tensor:
    """The weights (b, h, i, j) with which the gate loop sums the values: (q_i k_j) Re(a_{j+1} ... a_i), 0 for j > i."""
    with no_autocast(q):
        scores = at_least_float32(q) @ at_least_float32(k).transpose(-1, -2)
        weights = scores * decay(torch.view_as_real(gate.to(complex_of(q.dtype))))
    return weights.to(q.dtype)


def _reference(q: Tensor, k: Tensor, v: Tensor, gate: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
    outs = []
    for t in range(q.shape[2]):
        h = gate[:, :, t, None, None] * h + k[:, :, t, :, None] * v[:, :, t, None, :]
        outs.append((q[:, :, t, :, None] * h.real).sum(-2))
    return torch.stack(outs, dim=2), h


def _elementwise(q: Tensor, k: Tensor, v: Tensor, gate: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    written = (k * v).squeeze(-1).transpose(1, 2)  # (b, n, h)
    out, last = linear_recurrence(
        gate.transpose(1, 2), torch.complex(written, torch.zeros_like(written)), state=state[:, :, 0, 0]
    )
    return q * out.real.transpose(1, 2)[..., None], last[:, :, None, None]


def _check(q: Tensor, v: Tensor, gate: Tensor, state: Tensor | None) -> None:
    if not gate.is_complex():
        raise TypeError(f"gate must be complex, got dtype {gate.dtype}")
    if gate.shape != q.shape[:3] or q.shape[:3] != v.shape[:3] or not q.shape[2]:
        raise ValueError(
            f"gate must be (b, h, n) as q, k and v are, with n >= 1, got shapes {tuple(gate.shape)}, "
            f"{tuple(q.shape)} and {tuple(v.shape)}"
        )
    if state is None:
        return
    want = (*q.shape[:2], q.shape[3], v.shape[3])
    if state.shape != want:
        raise ValueError(f"state must be (b, h, e, e_v) = {want}, got shape {tuple(state.shape)}")
    runs_in = complex_of(q.dtype)
    if state.dtype != runs_in:
        raise TypeError(f"state must be of dtype {runs_in}, in which the gate loop runs, got {state.dtype}")
