"""Attention under a sparse pattern by its definition: softmax attention over all pairs, masked.

Paper: Sparse Transformer, https://arxiv.org/abs/1904.10509
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from attention_zoo.ops.precision import at_least_float32, no_autocast
from attention_zoo.ops.softmax import Bias, DistanceBias


def pattern_attention(q: Tensor, k: Tensor, v: Tensor, allowed: Tensor, bias: Bias | None, dropout: float) -> Tensor:
    """softmax(e^-0.5 q k^T + bias) v over the allowed pairs.

    Args:
        q: (b, h, i, e).
        k, v: (b, kv, j, e); each key/value head serves h / kv neighbouring query heads.
        allowed: bool, broadcasts to (b, h, i, j), True where a query attends to a key.
        bias: broadcasts to (b, h, i, j), a `DistanceBias`, or None.
        dropout: dropout probability of the weights.
    """
    import einx

    with no_autocast(q):
        weights = F.dropout(pattern_weights(q, k, allowed, bias), dropout)
        out = einx.dot("b (kv g) i j, b kv j e -> b (kv g) i e", weights, at_least_float32(v))
        return out.to(v.dtype)


def pattern_weights(q: Tensor, k: Tensor, allowed: Tensor, bias: Bias | None) -> Tensor:
    """The weights (b, h, i, j) of `pattern_attention`, in at least float32; 0 for a query without an allowed key."""
    import einx

    with no_autocast(q):
        q, k = at_least_float32(q), at_least_float32(k)
        scores = q.shape[-1] ** -0.5 * einx.dot("b (kv g) i e, b kv j e -> b (kv g) i j", q, k)
        if bias is not None:
            scores = scores + (bias.pairs(q.shape[2], k.shape[2]) if isinstance(bias, DistanceBias) else bias)
        scores = scores.masked_fill(~allowed, torch.finfo(scores.dtype).min)  # finite: no NaN without an allowed key
        return einx.softmax("b h i [j]", scores).masked_fill(~allowed, 0.0)
