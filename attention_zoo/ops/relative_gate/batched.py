"""Attention with relative gates as batched matrix products of all tokens, for devices on which loops are slow.

The sequence is halved again and again. For a query i of a second half and a key j of the first half, the product of
gates factorises at the first token m of the second half, without division:
    a_{j+1} ... a_i = (a_{j+1} ... a_{m-1}) (a_m ... a_i)
so that the scores between the halves are one matrix product of keys and queries that are multiplied by their part, for
all halves of one size at once. Pairs of features are complex here: [q Re f, q Im f] . [k Re g, -k Im g] is
(q . k) Re(f g). The number of operators grows with the logarithm of the length.

Paper: GateLoop, https://arxiv.org/abs/2311.01927
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from attention_zoo.ops.gate_loop.gates import products_up_to
from attention_zoo.ops.masks import visible
from attention_zoo.ops.tiling import masked_softmax

SIZE = 8  # most tokens of the smallest blocks, for whose pairs the products are computed one by one


def batched_relative_gate_attention(
    q: Tensor, k: Tensor, v: Tensor, gate: Tensor, mask: Tensor | None, softmax: bool, dropout: float
) -> Tensor:
    """The outputs (b, h, i, e_v); arguments as in `relative_gate_attention`, in at least float32 and complex64."""
    arguments = q, k, v, torch.view_as_real(gate.resolve_conj()), mask, softmax, dropout
    if torch.is_grad_enabled():  # the scores of all pairs are recomputed in backward instead of saved
        return checkpoint(_attend, *arguments, use_reentrant=False, preserve_rng_state=dropout > 0)
    return _attend(*arguments)


def batched_relative_gate_weights(q: Tensor, k: Tensor, gate: Tensor, mask: Tensor | None, softmax: bool) -> Tensor:
    """The weights (b, h, i, j); arguments as in `batched_relative_gate_attention`."""
    scores = relative_scores(q, k, gate)
    allowed = visible(*scores.shape[2:], mask=mask, causal=True, device=q.device)
    if softmax:
        return masked_softmax(scores, allowed)
    return scores if allowed is None else scores.masked_fill(~allowed, 0.0)


def _attend(
    q: Tensor, k: Tensor, v: Tensor, gate: Tensor, mask: Tensor | None, softmax: bool, dropout: float
) -> Tensor:
    weights = batched_relative_gate_weights(q, k, torch.view_as_complex(gate), mask, softmax)
    return F.dropout(weights, dropout) @ v


def relative_scores(q: Tensor, k: Tensor, gate: Tensor) -> Tensor:
    """The scores sim_ij of `relative_gate_attention`, (b, h, i, j); those of keys after their query have no meaning."""
    queries, keys = q.shape[2], k.shape[2]
    q = q * q.shape[3] ** -0.5
    if queries == 1:
        return fold_query(q) @ fold_key(k, products_after(gate)).transpose(-1, -2)
    levels = ((keys - 1) // SIZE).bit_length()
    size = -(-keys // 2**levels)  # tokens of the smallest blocks
    missing = size * 2**levels - keys  # tokens at the end, which no result contains
    q, k = F.pad(q, (0, 0, keys - queries, missing)), F.pad(k, (0, 0, 0, missing))
    gate = torch.cat((gate, gate.new_ones(*gate.shape[:2], missing, gate.shape[3])), dim=2)
    q, k, gate = (split_axis(x, 2, (-1, size)) for x in (q, k, gate))  # (b, h, blocks, size, ...)

    products = _products(gate)  # (b, h, blocks, i, j, p)
    pairs = split_axis(q[..., :, None, :] * k[..., None, :, :], -1, (-1, 2)).sum(-1)
    scores = pairs.mul(products.real).sum(-1)
    since, after = gate[..., :1, :] * products[..., 0, :], products[..., -1, :, :]
    for _ in range(levels):
        q, k, scores, since, after = (split_axis(x, 2, (-1, 2)) for x in (q, k, scores, since, after))
        (past, present), (since, later), (before, after) = (x.unbind(3) for x in (scores, since, after))
        across = fold_query(q[:, :, :, 1], later) @ fold_key(k[:, :, :, 0], before).transpose(-1, -2)
        scores = torch.cat((F.pad(past, (0, past.shape[-1])), torch.cat((across, present), dim=-1)), dim=-2)
        q, k = q.flatten(3, 4), k.flatten(3, 4)
        before = before * later[..., -1:, :]
        since, after = torch.cat((since, since[..., -1:, :] * later), -2), torch.cat((before, after), dim=-2)
    return scores[:, :, 0, keys - queries : keys, :keys]


def fold_query(q: Tensor, factor: Tensor | None = None) -> Tensor:
    """[q Re f, q Im f], (..., n, 2e), for a factor f (..., n, e / 2) of every pair of features; None: 1."""
    q = split_axis(q, -1, (-1, 2)).transpose(-1, -2)  # (..., 2, p): operators are slow along an axis of size 2
    if factor is None:
        return torch.stack((q, torch.zeros_like(q)), dim=-3).flatten(-3)
    factor = factor[..., None, :]
    return torch.stack((q * factor.real, q * factor.imag), dim=-3).flatten(-3)


def fold_key(k: Tensor, factor: Tensor) -> Tensor:
    """[k Re g, -k Im g], (..., n, 2e), whose product with `fold_query(q, f)` is the sum of (q . k) Re(f g)."""
    return fold_query(k, factor.conj())


def turn_keys(keys: Tensor, factor: Tensor) -> Tensor:
    """`fold_key` of keys with a further factor (..., n, e / 2), from keys (..., n, 2e) folded before."""
    (re, im), factor = split_axis(keys, -1, (2, 2, -1)).unbind(-3), factor[..., None, :]
    turned = re * factor.real + im * factor.imag, im * factor.real - re * factor.imag
    return torch.stack(turned, dim=-3).flatten(-3)


def split_axis(x: Tensor, dim: int, sizes: tuple[int, ...]) -> Tensor:
    """One axis as several."""
    out: Tensor = x.unflatten(dim, sizes)  # type: ignore[no-untyped-call]
    return out


def products_after(gate: Tensor) -> Tensor:
    """a_{t+1} ... a_n along axis 2; 1 for the last token."""
    return products_up_to(torch.cat((torch.ones_like(gate[:, :, :1]), gate[:, :, 1:].flip(2)), dim=2)).flip(2)


def _products(gate: Tensor) -> Tensor:
    """a_{j+1} ... a_i for all pairs of tokens of a block, (..., i, j, p), of gates (..., n, p); 1 for j >= i."""
    n = gate.shape[-2]
    later = torch.ones(n, n, dtype=torch.bool, device=gate.device).tril(-1)
    products = torch.where(later[..., None], gate[..., :, None, :], torch.ones_like(gate[..., :1, None, :]))
    shift = 1
    while shift < n:
        further = products[..., shift:, :, :] * products[..., :-shift, :, :]
        products = torch.cat((products[..., :shift, :, :], further), dim=-3)
        shift *= 2
    return products
