"""Reference implementation of attention with relative gates: all scores at once, from the products of gates.

Paper: GateLoop, https://arxiv.org/abs/2311.01927
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from attention_zoo.ops.masks import visible


def relative_gate_reference(
    q: Tensor, k: Tensor, v: Tensor, gate: Tensor, mask: Tensor | None, softmax: bool, dropout: float
) -> Tensor:
    """out_i = sum_j w_ij v_j over the allowed keys, w = softmax(sim) or sim itself.

    sim_ij = e^-0.5 sum_p (q_{i,2p} k_{j,2p} + q_{i,2p+1} k_{j,2p+1}) Re(a_{j+1,p} ... a_{i,p})
    """
    import einx

    products = _products(gate)[:, :, k.shape[2] - q.shape[2] :]
    pairs = einx.dot("b h i (p f), b h j (p f) -> b h i j p", q, k, f=2)
    sim = q.shape[3] ** -0.5 * einx.dot("b h i j p, b h i j p -> b h i j", pairs, products.real)
    allowed = visible(*sim.shape[2:], mask=mask, causal=True, device=q.device)
    weights = sim
    if softmax:
        weights = (sim if allowed is None else sim.masked_fill(~allowed, torch.finfo(sim.dtype).min)).softmax(-1)
    if allowed is not None:
        weights = weights.masked_fill(~allowed, 0.0)
    return einx.dot("b h i j, b h j f -> b h i f", F.dropout(weights, dropout), v)


def _products(gate: Tensor) -> Tensor:
    """a_{j+1} ... a_i, (b, h, i, j, p), for gates (b, h, j, p) of all keys; 1 for j >= i."""
    row, rows = torch.ones_like(gate), []
    for i in range(gate.shape[2]):
        row = torch.cat((row[:, :, :i] * gate[:, :, i, None], row[:, :, i:]), dim=2)
        rows.append(row)
    return torch.stack(rows, dim=2)
