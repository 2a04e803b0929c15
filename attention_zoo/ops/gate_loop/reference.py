"""Reference implementations of the gate loops: the recurrences as the paper writes them.

Paper: GateLoop, https://arxiv.org/abs/2311.01927
"""

from __future__ import annotations

import torch
from torch import Tensor


def gate_loop_reference(q: Tensor, k: Tensor, v: Tensor, gate: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """state_t = a_t state_{t-1} + k_t v_t^T, y_t = q_t^T Re(state_t)."""
    import einx

    kv = einx.multiply("b h n e, b h n f -> b h n e f", k, v)
    states = []
    for t in range(q.shape[2]):
        state = gate[:, :, t, None, None] * state + kv[:, :, t]
        states.append(state)
    return einx.dot("b h n e, b h n e f -> b h n f", q, torch.stack(states, dim=2).real), state


def channel_gate_loop_reference(
    q: Tensor, k: Tensor, v: Tensor, z: Tensor, mask: Tensor | None, starts: Tensor | None, state: Tensor
) -> tuple[Tensor, Tensor]:
    """state_t = a_t state_{t-1} + k_t v_t, y_t = q_t Re(state_t), a_t = sigma(|z_t|) e^{i arg z_t}."""
    z = torch.complex(z[..., 0], z[..., 1])
    zero = z == 0  # where the polar form has no derivative
    direction = z.masked_fill(zero, 1.0)
    gate = torch.polar(direction.abs().sigmoid(), direction.angle()).masked_fill(zero, 0.5)
    kv = k * v
    if mask is not None:
        gate = gate.masked_fill(~mask[..., None], 1.0)
        kv = kv.masked_fill(~mask[..., None], 0.0)
    if starts is not None:
        gate = gate.masked_fill(starts[..., None], 0.0)
    states = linear_recurrence_reference(gate, kv, state)
    return q * states.real, states[:, -1]


def linear_recurrence_reference(a: Tensor, x: Tensor, state: Tensor) -> Tensor:
    """state_t = a_t state_{t-1} + x_t; the states of all tokens, (b, n, d)."""
    states = []
    for t in range(x.shape[1]):
        state = a[:, t] * state + x[:, t]
        states.append(state)
    return torch.stack(states, dim=1)
