"""Slow formulas, written from the papers independently of the library. Tests compare its results with them."""

from __future__ import annotations

import torch
from torch import Tensor


def relative_error(got: Tensor, want: Tensor) -> float:
    """||got - want|| / ||want|| in float64."""
    got, want = got.detach().double(), want.detach().double()
    assert got.shape == want.shape, f"shapes {tuple(got.shape)} and {tuple(want.shape)}"
    return float((got - want).norm() / want.norm().clamp(min=1e-30))


def attend_one_by_one(q: Tensor, k: Tensor, v: Tensor, allowed: Tensor, bias: Tensor | None, scale: float) -> Tensor:
    """Softmax attention one query at a time, over its allowed keys only; `allowed` is (b, h, i, j) bool."""
    b, h, i, _ = q.shape
    group = h // k.shape[1]
    rows = []
    for row in range(b):
        for head in range(h):
            keys, values = k[row, head // group], v[row, head // group]
            for query in range(i):
                chosen = allowed[row, head, query].nonzero()[:, 0]
                if not len(chosen):
                    rows.append(values.new_zeros(values.shape[-1]))
                    continue
                scores = scale * keys[chosen] @ q[row, head, query]
                if bias is not None:
                    scores = scores + bias[row, head, query, chosen]
                powers = torch.exp(scores - scores.max().detach())
                rows.append((powers / powers.sum()) @ values[chosen])
    return torch.stack(rows).view(b, h, i, -1)


def allowed_pairs(shape: tuple[int, int, int, int], *, mask: Tensor | None, causal: bool) -> Tensor:
    """The allowed mask (b, h, i, j) by definition: the mask allows the pair, and key j <= query i + (J - I)."""
    queries, keys = shape[-2:]
    allowed = torch.ones(shape, dtype=torch.bool)
    if mask is not None:
        allowed &= mask[:, None, None, :] if mask.ndim == 2 else mask
    if causal:
        for query in range(queries):
            for key in range(keys):
                if key > query + (keys - queries):
                    allowed[:, :, query, key] = False
    return allowed


def bias_of_pairs(values: Tensor, queries: int, keys: int) -> Tensor:
    """The bias (h, i, j) of values per distance: entry (key index) - (query index) + i - 1 for each pair."""
    rows = [
        torch.stack([values[:, key - query + queries - 1] for key in range(keys)], dim=-1) for query in range(queries)
    ]
    return torch.stack(rows, dim=-2)


def unit_slices(x: Tensor, groups: int, eps: float) -> Tensor:
    """x / max(||x||, eps) in each of `groups` equal slices of the features."""
    slices = x.split(x.shape[-1] // groups, dim=-1)
    return torch.cat([part / part.square().sum(-1, keepdim=True).sqrt().clamp(min=eps) for part in slices], dim=-1)
