"""Softmax attention with data-dependent relative positions: between key and query every pair of features is gated.

Paper: GateLoop, https://arxiv.org/abs/2311.01927
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from attention_zoo.ops.implementation import choose
from attention_zoo.ops.masks import visible
from attention_zoo.ops.precision import at_least_float32, no_autocast
from attention_zoo.ops.softmax import check_heads

QUERY_BLOCK = 32  # queries whose scores are held at a time; among themselves they cost 32 e / 2 products each
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
            hard reset; the fast path gives such a gate no gradient.
        mask: (b, j) bool, True = a real token. The gates of masked tokens are taken as 1.
        softmax: False for the raw scores as weights.
        dropout: probability with which a weight is dropped.
        impl: "auto", "reference" or "blocks".

    Returns:
        (b, h, i, e_v) in the dtype of v.

    Raises:
        TypeError: a dtype does not fit.
        ValueError: a shape does not fit.
    """
    impl = choose(impl, ("blocks",))
    check_heads(q, k, v)
    with no_autocast(q):
        q, k, wide, gate = _prepare(q, k, v, gate, mask)
        if impl == "reference":
            weights = _weigh(_reference_scores(q, k, gate), mask, softmax, dropout)
            return (weights @ wide).to(v.dtype)
        log, cos, sin = _log_and_phase(gate, q.dtype)
        outs = []
        for start in range(0, q.shape[2], QUERY_BLOCK):
            stop = min(start + QUERY_BLOCK, q.shape[2])

            def attend(*parts: Tensor, start: int = start, stop: int = stop) -> Tensor:
                q, k, log, cos, sin, values = parts
                scores = _scores(q, k, log, cos, sin, start, stop)
                weights = _weigh(scores, None if mask is None else mask[:, : scores.shape[-1]], softmax, dropout)
                return weights @ values[:, :, : scores.shape[-1]]

            parts = (q, k, log, cos, sin, wide)
            grad = torch.is_grad_enabled()
            outs.append(checkpoint(attend, *parts, use_reentrant=False) if grad else attend(*parts))
        return torch.cat(outs, dim=2).to(v.dtype)


def relative_gate_weights(
    q: Tensor, k: Tensor, gate: Tensor, *, mask: Tensor | None = None, softmax: bool = True
) -> Tensor:
    """The weights (b, h, i, j) with which `relative_gate_attention` sums the values."""
    with no_autocast(q):
        wide_q, wide_k, _, gate = _prepare(q, k, k, gate, mask)
        log, cos, sin = _log_and_phase(gate, wide_q.dtype)
        rows = []
        for start in range(0, q.shape[2], QUERY_BLOCK):
            scores = _scores(wide_q, wide_k, log, cos, sin, start, min(start + QUERY_BLOCK, q.shape[2]))
            rows.append(torch.nn.functional.pad(scores, (0, k.shape[2] - scores.shape[-1])))
        return _weigh(torch.cat(rows, dim=2), mask, softmax, 0.0).to(q.dtype)


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


def _weigh(scores: Tensor, mask: Tensor | None, softmax: bool, dropout: float) -> Tensor:
    key = None if mask is None else mask[:, None, None]
    seen = visible(*scores.shape[-2:], mask=key, causal=True, device=scores.device)
    weights = scores
    if softmax:
        hidden = scores if seen is None else scores.masked_fill(~seen, torch.finfo(scores.dtype).min)
        weights = hidden.softmax(-1)
    if seen is not None:
        weights = weights.masked_fill(~seen, 0.0)
    return torch.nn.functional.dropout(weights, dropout) if dropout else weights


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
    return x.reshape(*x.shape[:-1], -1, 2)


def _log_and_phase(gate: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Of the gates multiplied up along the sequence: log-magnitude in float64, cosine and sine of the phase."""
    zero = gate == 0
    re, im = torch.view_as_real(torch.where(zero, torch.ones_like(gate), gate)).double().unbind(-1)
    log = torch.hypot(re, im).clamp(min=SMALLEST).log().masked_fill(zero, math.log(SMALLEST))
    phase = torch.atan2(im, re).cumsum(2)
    return log.cumsum(2), phase.cos().to(dtype), phase.sin().to(dtype)


def _scores(q: Tensor, k: Tensor, log: Tensor, cos: Tensor, sin: Tensor, start: int, stop: int) -> Tensor:
    """The scores (b, h, stop - start, keys) of the queries start ... stop - 1 and the keys up to the last of them."""
    first, last = k.shape[2] - q.shape[2] + start, k.shape[2] - q.shape[2] + stop
    here = slice(first, last)
    query = _pairs(q[:, :, start:stop])
    key = _pairs(k[:, :, here])
    sizes = log[:, :, here, None] - log[:, :, None, here]
    later = torch.ones(stop - start, stop - start, dtype=torch.bool, device=q.device).triu(1)
    sizes = sizes.masked_fill(later[..., None], -torch.inf).to(q.dtype).exp()  # (b, h, i, j, p)
    turn = cos[:, :, here, None] * cos[:, :, None, here] + sin[:, :, here, None] * sin[:, :, None, here]
    near = ((query[:, :, :, None] * key[:, :, None]).sum(-1) * sizes * turn).sum(-1)
    if not first:
        return near
    meet = log[:, :, first : first + 1]
    left = (log[:, :, here] - meet).to(q.dtype).exp()
    right = (meet - log[:, :, :first]).to(q.dtype).exp()
    query = torch.cat((query * (left * cos[:, :, here])[..., None], query * (left * sin[:, :, here])[..., None]), -1)
    key = _pairs(k[:, :, :first])
    key = torch.cat((key * (right * cos[:, :, :first])[..., None], key * (right * sin[:, :, :first])[..., None]), -1)
    return torch.cat((query.flatten(-2) @ key.flatten(-2).transpose(-1, -2), near), dim=-1)
