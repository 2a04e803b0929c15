"""Attention of one query to the keys of its pattern, gathered into one tensor: a decoding step."""

from __future__ import annotations

import torch
from torch import Tensor

from attention_zoo.ops.softmax import softmax_attention
from attention_zoo.ops.sparse.pattern import Pattern


def gather_attention(pattern: Pattern, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dropout: float) -> Tensor:
    """q (b, h, 1, e), the last of the tokens of k, v (b, h, j, e), mask (b, j) bool or None -> (b, h, 1, e)."""
    keys = pattern.keys(k.shape[2] - 1)
    mask = None if mask is None else _gather(mask, keys, dim=1)
    return softmax_attention(q, _gather(k, keys, dim=2), _gather(v, keys, dim=2), mask=mask, dropout=dropout)


def _gather(x: Tensor, keys: list[slice | list[int]], *, dim: int) -> Tensor:
    before = (slice(None),) * dim
    parts = [
        x[*before, part] if isinstance(part, slice) else x.index_select(dim, torch.tensor(part, device=x.device))
        for part in keys
    ]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=dim)
