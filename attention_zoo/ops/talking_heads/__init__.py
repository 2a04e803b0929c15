"""Talking heads: the maps of all heads are mixed before the softmax and after it.

Paper: Talking-Heads Attention, https://arxiv.org/abs/2003.02436; over streams: https://arxiv.org/abs/2107.10342
"""

from __future__ import annotations

import torch
from torch import Tensor

from attention_zoo.ops.implementation import choose
from attention_zoo.ops.masks import check_mask, visible
from attention_zoo.ops.precision import at_least_float32, no_autocast
from attention_zoo.ops.softmax import check_heads, masked_softmax
from attention_zoo.ops.talking_heads.head_mixing import HeadMix, HeadMLP, check_mix, mix_heads, parts_of
from attention_zoo.ops.talking_heads.tiled import kept_weights, talking_heads_by_blocks

__all__ = ["HeadMLP", "HeadMix", "mix_heads", "talking_heads_attention", "talking_heads_weights"]


def talking_heads_weights(
    q: Tensor,
    k: Tensor,
    pre_softmax: HeadMix,
    *,
    mask: Tensor | None = None,
    causal: bool = False,
    scale: float | None = None,
) -> Tensor:
    """The softmax of the scores after the mix before it, (b, C, i, j), in float32 at least."""
    with no_autocast(q):
        scale = q.shape[-1] ** -0.5 if scale is None else scale
        scores = mix_heads((at_least_float32(q) * scale) @ at_least_float32(k).transpose(-1, -2), pre_softmax)
        return masked_softmax(scores, visible(*scores.shape[-2:], mask=mask, causal=causal, device=q.device))


def talking_heads_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pre_softmax: HeadMix,
    post_softmax: HeadMix,
    *,
    causal: bool = False,
    mask: Tensor | None = None,
    scale: float | None = None,
    dropout: float = 0.0,
    impl: str = "auto",
) -> Tensor:
    """post_softmax(softmax(pre_softmax(scale * q k^T))) v, where `pre_softmax` and `post_softmax` mix the maps of all heads.

    Args:
        q: (b, C, i, e); C counts all heads that talk: those of one stream, or of all streams of a row.
        k, v: (b, C, j, e).
        pre_softmax, post_softmax: a mix (C, C), with out_o = sum_c mix[o, c] map_c; a `HeadMLP`; or None.
        causal: hide the keys after a query; the last query stands at the last key.
        mask: padding (b, j), or anything boolean that broadcasts to (b, C, i, j); True = visible.
        scale: e^-0.5 where None.
        dropout: probability with which a weight is dropped, between the softmax and the mix after it.
        impl: "auto", "reference" (all maps at once, twice differentiable) or "tiled" (blocks of queries, computed
            again in backward: no tensor of size C n^2 is held).

    Returns:
        (b, C, i, e) in the dtype of v. A query that sees no key gets exactly 0.

    Raises:
        ValueError, TypeError: shapes or dtypes do not fit; the message names the argument.
    """
    impl = choose(impl, ("tiled",))
    check_heads(q, k, v)
    check_mask(mask, q.shape[0], q.shape[1], q.shape[2], k.shape[2])
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout must lie in [0, 1), got {dropout=}")
    check_mix("pre_softmax", pre_softmax, q.shape[1])
    check_mix("post_softmax", post_softmax, q.shape[1])
    if k.shape[1] != q.shape[1]:
        raise ValueError(f"k must have the heads of q, for every head talks, got {k.shape[1]} and {q.shape[1]}")
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if impl == "reference":
        return _attend(q, k, v, pre_softmax, post_softmax, mask, causal, scale, dropout, None)
    # The seed, not the dropped weights, is what backward needs to drop them again.
    seed = torch.randint(2**62, (), device="cpu") if dropout else torch.zeros((), dtype=torch.int64)
    with no_autocast(q):  # it reaches into the op, and backward, which computes the maps again, runs without it
        out: Tensor = talking_heads_by_blocks(
            q, k, v, parts_of(pre_softmax), parts_of(post_softmax), mask, causal, scale, dropout, seed
        )
    return out


def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pre_softmax: HeadMix,
    post_softmax: HeadMix,
    mask: Tensor | None,
    causal: bool,
    scale: float,
    dropout: float,
    generator: torch.Generator | None,
) -> Tensor:
    """The reference: all maps of these queries at once."""
    weights = talking_heads_weights(q, k, pre_softmax, mask=mask, causal=causal, scale=scale)
    with no_autocast(q):
        if dropout:
            weights = weights * kept_weights(weights, dropout, generator)
        return (mix_heads(weights, post_softmax) @ at_least_float32(v)).to(v.dtype)
