"""Cosine-sim attention as its equation is written.

q^ = q / ||q||,  k^ = k / ||k||,  w_ij = softmax_j(scale q^_i . k^_j + bias_ij),  out_i = sum_j w_ij v_j
"""

from __future__ import annotations

import torch
from einops import rearrange, repeat
from torch import Tensor
from torch.nn import functional as F

from attention_zoo.ops.masks import visible
from attention_zoo.ops.precision import at_least_float32, no_autocast
from attention_zoo.ops.softmax import Bias, DistanceBias


def l2_normalize(x: Tensor, groups: int, eps: float) -> Tensor:
    """x / max(||x||, eps) in each of `groups` slices of the features, in at least float32."""
    slices = rearrange(at_least_float32(x), "... (g e) -> ... g e", g=groups)
    norm = torch.linalg.vector_norm(slices, dim=-1, keepdim=True)
    return rearrange(slices / norm.clamp(min=eps), "... g e -> ... (g e)")


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    causal: bool,
    bias: Bias | None,
    scale: float,
    groups: int,
    eps: float,
    dropout: float,
) -> Tensor:
    """The output out, (b, h, i, e), in the dtype of `v`. Arguments as in `cosine_sim_attention`, with a head axis."""
    import einx

    with no_autocast(q):
        k, values = (repeat(x, "b h j e -> b (h group) j e", group=q.shape[1] // k.shape[1]) for x in (k, v))
        q, k = (l2_normalize(x, groups, eps) for x in (q, k))
        scores = scale * einx.dot("b h i e, b h j e -> b h i j", q, k)
        i, j = scores.shape[-2:]
        if bias is not None:
            scores = scores + (bias.pairs(i, j) if isinstance(bias, DistanceBias) else bias)
        allowed = visible(i, j, mask=mask, causal=causal, device=q.device)
        if allowed is None:
            weights = scores.softmax(dim=-1)
        else:  # the finite fill keeps rows without an allowed key free of NaN, the second fill makes their weights 0
            weights = scores.masked_fill(~allowed, torch.finfo(scores.dtype).min).softmax(dim=-1)
            weights = weights.masked_fill(~allowed, 0.0)
        weights = F.dropout(weights, dropout)
        return einx.dot("b h i j, b h j e -> b h i e", weights, at_least_float32(values)).to(v.dtype)
