"""Window attention by its definition: softmax attention over all pairs, masked."""

from __future__ import annotations

from torch import Tensor

from attention_zoo.ops.softmax.reference import attention as softmax_attention


def attention(
    q: Tensor, k: Tensor, v: Tensor, allowed: Tensor | None, bias: Tensor | None, scale: float, dropout: float
) -> Tensor:
    """softmax(scale q k^T + bias) v over the pairs of `allowed`, bool, which broadcasts to (b, h, i, j)."""
    return softmax_attention(q, k, v, allowed, False, bias, scale, dropout)
