"""Attention under a sparse pattern by its definition: softmax attention over all pairs, masked."""

from __future__ import annotations

from torch import Tensor

from attention_zoo.ops.softmax import Bias
from attention_zoo.ops.softmax.reference import attention, attention_weights


def pattern_attention(q: Tensor, k: Tensor, v: Tensor, allowed: Tensor, bias: Bias | None, dropout: float) -> Tensor:
    """softmax(e^-0.5 q k^T + bias) v over the pairs of `allowed`, bool, which broadcasts to (b, h, i, j)."""
    return attention(q, k, v, allowed, False, bias, q.shape[-1] ** -0.5, dropout)


def pattern_weights(q: Tensor, k: Tensor, allowed: Tensor, bias: Bias | None) -> Tensor:
    """The weights (b, h, i, j) of `pattern_attention`, in at least float32; 0 for a query without an allowed key."""
    return attention_weights(q, k, allowed, False, bias, q.shape[-1] ** -0.5)
