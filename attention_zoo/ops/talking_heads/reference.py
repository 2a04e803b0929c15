"""Talking-heads attention and the diversity of streams by their definition, all maps at once.

Papers: Talking-Heads Attention, https://arxiv.org/abs/2003.02436; Multi-Stream Transformers,
    https://arxiv.org/abs/2107.10342
"""

from __future__ import annotations

import torch
from einops import rearrange
from torch import Tensor
from torch.nn import functional as F

from attention_zoo.ops.masks import visible
from attention_zoo.ops.precision import at_least_float32, no_autocast
from attention_zoo.ops.talking_heads import HeadMix, HeadMLP


def talking_heads_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pre_softmax: HeadMix,
    post_softmax: HeadMix,
    *,
    mask: Tensor | None,
    bias: Tensor | None,
    causal: bool,
    scale: float,
    dropout: float,
) -> Tensor:
    """post_softmax(softmax(pre_softmax(scale * q k^T) + bias)) v: arguments as in `ops.talking_heads_attention`.

    Head axes: h_k of q and k, h of the softmax, h_v of v; each mix maps those before it to those after it.
    An additive mask is given as a boolean mask and a finite bias.
    """
    import einx

    with no_autocast(q):
        weights = talking_heads_weights(q, k, pre_softmax, mask=mask, bias=bias, causal=causal, scale=scale)
        weights = mix_heads(F.dropout(weights, dropout), post_softmax)
        return einx.dot("b h i j, b h j e -> b h i e", weights, at_least_float32(v)).to(v.dtype)


def talking_heads_weights(
    q: Tensor,
    k: Tensor,
    pre_softmax: HeadMix,
    *,
    mask: Tensor | None,
    bias: Tensor | None = None,
    causal: bool,
    scale: float,
) -> Tensor:
    """softmax(pre_softmax(scale * q k^T) + bias), (b, h, i, j) in at least float32; 0 without an allowed key."""
    import einx

    with no_autocast(q):
        scores = scale * einx.dot("b h i e, b h j e -> b h i j", at_least_float32(q), at_least_float32(k))
        scores = mix_heads(scores, pre_softmax)
        scores = scores if bias is None else scores + bias
        allowed = visible(q.shape[2], k.shape[2], mask=mask, causal=causal, device=q.device)
        if allowed is None:
            return einx.softmax("b h i [j]", scores)
        scores = scores.masked_fill(~allowed, torch.finfo(scores.dtype).min)  # finite: no NaN without an allowed key
        return einx.softmax("b h i [j]", scores).masked_fill(~allowed, 0.0)


def mix_heads(maps: Tensor, mix: HeadMix) -> Tensor:
    """out_o = sum_h mix[o, h] maps_h, or the formula of `HeadMLP`; None: the maps themselves."""
    import einx

    if mix is None:
        return maps
    if not isinstance(mix, HeadMLP):
        return einx.dot("o h, b h i j -> b o i j", mix.to(maps.dtype), maps)
    norm, w1, w2 = (part.to(maps.dtype) for part in mix)
    rms = (einx.mean("b [h] i j -> b i j", maps.square()) + 1e-5).sqrt()
    normed = einx.multiply("b h i j, h -> b h i j", einx.divide("b h i j, b i j -> b h i j", maps, rms), norm)
    hidden = F.gelu(einx.dot("m h, b h i j -> b m i j", w1, normed))
    return maps + einx.dot("h m, b m i j -> b h i j", w2, hidden)


def stream_diversity_loss(
    q: Tensor, k: Tensor, pre_softmax: HeadMix, *, streams: int, mask: Tensor | None, causal: bool, scale: float
) -> Tensor:
    """-(H((a + b) / 2) - (H(a) + H(b)) / 2), averaged over pairs of maps a, b of different streams and over queries."""
    import einx

    with no_autocast(q):
        maps = talking_heads_weights(q, k, pre_softmax, mask=mask, causal=causal, scale=scale)
        maps = rearrange(maps, "b (s h) i j -> b s h i j", s=streams)
        first, second = torch.triu_indices(streams, streams, offset=1, device=q.device)  # all pairs p of streams
        a, b = maps[:, first], maps[:, second]  # (b, p, h, i, j)
        middle = einx.add("b p h i j, b p k i j -> b p h k i j", a, b) / 2
        entropies = einx.add("b p h i, b p k i -> b p h k i", _entropy(a), _entropy(b))
        divergence = einx.mean("b [p h k] i", _entropy(middle) - entropies / 2)
        if mask is None:
            return -divergence.mean()
        return -divergence.masked_fill(~mask, 0.0).sum() / mask.sum().clamp(min=1)


def _entropy(weights: Tensor) -> Tensor:
    """H(p) = -sum_j p ln p in nats, with 0 ln 0 = 0 and a finite gradient there."""
    import einx

    return -einx.sum("... [j]", weights * weights.clamp(min=1e-30).log())
