"""Softmax attention with data-dependent relative positions: between key and query every pair of features is gated.

Paper: GateLoop, https://arxiv.org/abs/2311.01927
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from attention_zoo.ops.implementation import choose
from attention_zoo.ops.precision import at_least_float32, no_autocast
from attention_zoo.ops.relative_gate.tiled import relative_gate_blocks, relative_gate_scores, weigh
from attention_zoo.ops.softmax import check_heads

SMALLEST = 1e-300  # magnitude that stands for a gate of 0 in the logarithm


def relative_gate_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gate: Tensor,
    *,
    mask: Tensor | None = None,
    softmax: bool = True,
    dropout: float = 0.0,
    impl: str = "auto",
) -> Tensor:
    """out_i = sum_j w_ij v_j over j <= i, w = softmax(sim) or sim itself.

    sim_ij = e^-0.5 sum_p (q_{i,2p} k_{j,2p} + q_{i,2p+1} k_{j,2p+1}) Re(a_{j+1,p} ... a_{i,p})

    Time O(n^2 e), memory O(n e) in blocks of queries, computed again in backward. No product is divided by: a block of
    queries and the keys before it meet at the block's first token, from where both sides only shrink.

    Args:
        q: (b, h, i, e) queries, which stand at the end of the keys; e is even.
        k, v: (b, h, j, e), (b, h, j, e_v).
        gate: (b, h, j, e / 2) complex with 0 <= |a| <= 1, one for each pair of features of each key. Exactly 0 is a
            hard reset; the fast path gives such a gate no gradient, and that of one of size s with rounding over s.
        mask: (b, j) bool, True = a real token. The gates of masked tokens are taken as 1.
        softmax: False for the raw scores as weights.
        dropout: probability with which a weight is dropped.
        impl: "auto", "reference" or "tiled".

    Returns:
        (b, h, i, e_v) in the dtype of v.

    Raises:
        TypeError: a dtype does not fit.
        ValueError: a shape does not fit.
    """
    impl = choose(impl, ("tiled",))
    check_heads(q, k, v)
    with no_autocast(q):
        q, k, wide, gate = _prepare(q, k, v, gate, mask)
        if impl == "reference":
            weights = weigh(_reference_scores(q, k, gate), mask, softmax)
            return (F.dropout(weights, dropout) @ wide).to(v.dtype)
        log, phase = _log_and_phase(gate)
        # The seed, not the dropped weights, is what backward needs to drop them again.
        seed = torch.randint(2**62, (), device="cpu") if dropout else torch.zeros((), dtype=torch.int64)
        out: Tensor = relative_gate_blocks(q, k, wide, log, phase, mask, softmax, dropout, seed)
        return out.to(v.dtype)


def relative_gate_weights(
    q: Tensor, k: Tensor, gate: Tensor, *, mask: Tensor | None = None, softmax: bool = True
) -> Tensor:
    """The weights (b, h, i, j) with which `relative_gate_attention` sums the values."""
    with no_autocast(q):
        wide_q, wide_k, _, gate = _prepare(q, k, k, gate, mask)
        return weigh(relative_gate_scores(wide_q, wide_k, *_log_and_phase(gate)), mask, softmax).to(q.dtype)


def _prepare(
    q: Tensor, k: Tensor, v: Tensor, gate: Tensor, mask: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    if not gate.is_complex():
        raise TypeError(f"gate must be complex, got dtype {gate.dtype}")
    want = (*k.shape[:3], k.shape[3] // 2)
    if gate.shape != want or q.shape[3] % 2 or q.shape[1] != k.shape[1] or q.shape[2] > k.shape[2]:
        raise ValueError(
            f"gate must be (b, h, j, e / 2) = {want} for an even e, as many heads of q as of k and i <= j, got shapes "
            f"{tuple(gate.shape)}, {tuple(q.shape)} and {tuple(k.shape)}"
        )
    q, k, v = at_least_float32(q), at_least_float32(k), at_least_float32(v)
    gate = gate.to(torch.complex128 if q.dtype == torch.float64 else torch.complex64)
    if mask is not None:
        gate = torch.where(mask[:, None, :, None], gate, torch.ones_like(gate))
    return q * q.shape[-1] ** -0.5, k, v, gate


def _reference_scores(q: Tensor, k: Tensor, gate: Tensor) -> Tensor:
    offset, rows = k.shape[2] - q.shape[2], []
    products = gate[:, :, :0]  # a_{j+1} ... a_i for j = 0 ... i
    pairs = _pairs(k)
    for i in range(k.shape[2]):
        now = gate[:, :, i : i + 1]
        products = torch.cat((products * now, torch.ones_like(now)), dim=2)
        if i >= offset:
            query = _pairs(q[:, :, i - offset, None])
            scores = ((query * pairs[:, :, : i + 1]).sum(-1) * products.real).sum(-1)
            rows.append(torch.nn.functional.pad(scores, (0, k.shape[2] - i - 1)))
    return torch.stack(rows, dim=2)


def _pairs(x: Tensor) -> Tensor:
    """Features (..., e) as pairs (..., e / 2, 2)."""
    return x.reshape(*x.shape[:-1], x.shape[-1] // 2, 2)


def _log_and_phase(gate: Tensor) -> tuple[Tensor, Tensor]:
    """Of the gates multiplied up along the sequence: log-magnitude and phase, in float64."""
    re, im = (part.double() for part in torch.view_as_real(gate).unbind(-1))
    zero = (re == 0) & (im == 0)
    re = re.masked_fill(zero, 1.0)
    log = torch.hypot(re, im).clamp(min=SMALLEST).log().masked_fill(zero, math.log(SMALLEST))
    return log.cumsum(2), torch.atan2(im, re).cumsum(2)
