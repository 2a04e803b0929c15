"""How unlike the attention of different streams is: a loss that is least where their heads look elsewhere.

Paper: Multi-Stream Transformers, https://arxiv.org/abs/2107.10342
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from attention_zoo.ops.masks import slice_mask
from attention_zoo.ops.precision import no_autocast
from attention_zoo.ops.talking_heads import HeadMix, talking_heads_weights

QUERY_BLOCK = 64  # queries whose maps are compared at a time


def stream_diversity_loss(
    q: Tensor,
    k: Tensor,
    pre: HeadMix,
    *,
    streams: int,
    mask: Tensor | None = None,
    causal: bool = True,
    scale: float | None = None,
) -> Tensor:
    """Minus the mean Jensen-Shannon divergence between the softmax maps of different streams.

    -JSD(A1, A2) = (H(A1) + H(A2)) / 2 - H((A1 + A2) / 2), H the entropy in nats, averaged over pairs of streams, pairs
    of a head of either, real queries and rows. Computed in blocks of queries, again in backward.

    Args:
        q, k: (b, s h, n, e), the streams' heads in a row.
        pre: the mix before the softmax.
        streams: streams s.
        mask: (b, n) bool, True = a real token: as a key it is seen, as a query it counts.
        causal, scale: as in `talking_heads_attention`.

    Returns:
        A scalar in -ln 2 ... 0; 0 for one stream.
    """
    n = q.shape[2]
    if streams == 1:
        return torch.zeros((), dtype=torch.float32, device=q.device)
    total = torch.zeros((), dtype=torch.float32, device=q.device)
    for start in range(0, n, QUERY_BLOCK):
        stop = min(start + QUERY_BLOCK, n)
        keys = stop if causal else n
        counts = None if mask is None else mask[:, start:stop]

        def block(q: Tensor, k: Tensor, seen: Tensor | None, counts: Tensor | None) -> Tensor:
            weights = talking_heads_weights(q, k, pre, mask=seen, causal=causal, scale=scale)
            return _divergence(weights.view(len(weights), streams, -1, *weights.shape[2:]), counts)

        seen = slice_mask(mask, start, stop, keys)
        part = checkpoint(block, q[:, :, start:stop], k[:, :, :keys], seen, counts, use_reentrant=False)
        total = total + part
    queries = q.shape[0] * n if mask is None else mask.sum().clamp(min=1)
    return -total / queries


def _divergence(weights: Tensor, counts: Tensor | None) -> Tensor:
    """The sum over rows and queries that count of the mean divergence of all pairs, of maps (b, s, h, i, j)."""
    b, streams, heads, i, _ = weights.shape
    with no_autocast(weights):
        entropy = _entropy(weights)  # (b, s, h, i)
        total = weights.new_zeros(b, i)
        for first in range(streams):
            for second in range(first + 1, streams):
                for head in range(heads):  # one head of the first stream against all of the second
                    middle = _entropy((weights[:, first, head, None] + weights[:, second]) / 2)
                    total = total + (middle - (entropy[:, first, head, None] + entropy[:, second]) / 2).sum(1)
        if counts is not None:
            total = total.masked_fill(~counts, 0.0)
        return total.sum() / (heads * heads * streams * (streams - 1) / 2)


def _entropy(weights: Tensor) -> Tensor:
    """-sum_j p ln p in nats, with 0 ln 0 = 0 and a finite gradient there."""
    return -(weights * weights.clamp(min=1e-30).log()).sum(-1)
