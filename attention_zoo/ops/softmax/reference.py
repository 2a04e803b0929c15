"""Softmax attention as its equation is written.

w_ij = softmax_j(scale q_i . k_j + bias_ij),  out_i = sum_j w_ij v_j
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from attention_zoo.ops.masks import visible
from attention_zoo.ops.precision import at_least_float32, no_autocast
from attention_zoo.ops.softmax.bias import Bias, DistanceBias


def attention_weights(
    q: Tensor, k: Tensor, mask: Tensor | None, causal: bool, bias: Bias | None, scale: float
) -> Tensor:
    """The weights w, (b, h, i, j), in at least float32. Arguments as in `softmax_attention`."""
    import einx

    with no_autocast(q):
        # (kv g): each of the key/value heads serves g neighbouring query heads
        scores = scale * einx.dot("b (kv g) i e, b kv j e -> b (kv g) i j", at_least_float32(q), at_least_float32(k))
        i, j = scores.shape[-2:]
        if bias is not None:
            scores = scores + (bias.pairs(i, j) if isinstance(bias, DistanceBias) else bias)
        allowed = visible(i, j, mask=mask, causal=causal, device=q.device)
        if allowed is None:
            return scores.softmax(dim=-1)
        # the finite fill keeps rows without an allowed key free of NaN, the second fill makes their weights 0
        weights = scores.masked_fill(~allowed, torch.finfo(scores.dtype).min).softmax(dim=-1)
        return weights.masked_fill(~allowed, 0.0)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    causal: bool,
    bias: Bias | None,
    scale: float,
    dropout: float,
) -> Tensor:
    """The output out, (b, h, i, e), in the dtype of `v`. Arguments as in `softmax_attention`."""
    import einx

    weights = F.dropout(attention_weights(q, k, mask, causal, bias, scale), dropout)
    with no_autocast(q):
        return einx.dot("b (kv g) i j, b kv j e -> b (kv g) i e", weights, at_least_float32(v)).to(v.dtype)
