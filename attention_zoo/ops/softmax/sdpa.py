"""Softmax attention by torch's fused kernels, `scaled_dot_product_attention`."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from attention_zoo.ops import tiling
from attention_zoo.ops.masks import visible
from attention_zoo.ops.precision import no_autocast
from attention_zoo.ops.softmax.bias import Bias, DistanceBias, pairs_of_distances

# Float32 numbers in the widest vector register. With fewer keys and no mask torch's CPU kernel (as of 2.13) takes the
# maximum of a row of NaN as -inf, and returns 0 for it.
VECTOR = 16


def sdpa_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    causal: bool,
    bias: Bias | None,
    scale: float,
    dropout: float,
) -> Tensor:
    """Arguments as in `softmax_attention`."""
    i, j = q.shape[-2], k.shape[-2]
    # is_causal aligns top-left, which is bottom-right too where i = j. As a bool it is no symbol of a dynamic trace.
    is_causal = False
    if causal and mask is None and bias is None and i > 1 and i == j:
        is_causal = True
    if isinstance(bias, DistanceBias) and mask is None and (not causal or i <= j) and not tiling.prefers_tiles(q):
        bias, causal = pairs_of_distances(bias, i, j, causal, q.dtype), False
    allowed = None if is_causal else visible(i, j, mask=mask, causal=causal, device=q.device)
    has_key = None
    if bias is None and (allowed is None or tiling.prefers_tiles(q)):
        attn_mask = allowed
    else:
        attn_mask = bias.pairs(i, j) if isinstance(bias, DistanceBias) else q.new_zeros(()) if bias is None else bias
        if allowed is not None:  # an empty row keeps its finite bias: a row of -inf is NaN on some backends
            has_key = allowed.any(-1, keepdim=True)
            attn_mask = attn_mask.masked_fill(~allowed & has_key, -math.inf)
        if attn_mask.element_size() > q.element_size():
            # Rounded to half precision below. Softmax does not change with a shift of a row, and one that takes the
            # largest bias to 0 rounds the biases that matter least.
            attn_mask = attn_mask - attn_mask.detach().amax(-1, keepdim=True)
        attn_mask = attn_mask.to(q.dtype)
        attn_mask = attn_mask[(None,) * (4 - attn_mask.ndim)]
    with no_autocast(q):
        out = F.scaled_dot_product_attention(
            q, k, v, attn_mask, dropout, is_causal=is_causal, scale=scale, enable_gqa=k.shape[1] != q.shape[1]
        )
    if attn_mask is None and q.device.type == "cpu" and (torch.compiler.is_compiling() or j < VECTOR):
        out = out + (q.detach() * 0).sum(-1, keepdim=True)  # NaN for a query that is not finite, otherwise 0
    return out if has_key is None else torch.where(has_key, out, out.new_zeros(()))
