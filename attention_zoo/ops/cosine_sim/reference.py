"""Cosine-sim attention as its equation is written.

q^ = q / ||q||,  k^ = k / ||k||,  w_ij = softmax_j(scale q^_i . k^_j + bias_ij),  out_i = sum_j w_ij v_j

scale is a number, or a tensor of one number for all heads or one for each.
"""

from __future__ import annotations

import torch
from einops import rearrange
from torch import Tensor

from attention_zoo.ops.precision import at_least_float32, no_autocast
from attention_zoo.ops.softmax import Bias
from attention_zoo.ops.softmax.reference import attention as softmax_attention


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
    scale: float | Tensor,
    groups: int,
    eps: float,
    dropout: float,
) -> Tensor:
    """The output out, (b, h, i, e), in the dtype of `v`. Arguments as in `cosine_sim_attention`, with a head axis."""
    with no_autocast(q):
        q, k = (l2_normalize(x, groups, eps) for x in (q, k))
        if isinstance(scale, Tensor):
            q, scale = rearrange(scale.to(q.dtype), "h -> h 1 1") * q, 1.0
    return softmax_attention(q, k, v, mask, causal, bias, scale, dropout)
