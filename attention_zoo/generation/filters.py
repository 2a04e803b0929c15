"""Filters on logits: what a sampler may still choose. A filtered logit is -inf.

Papers: top-p, https://arxiv.org/abs/1904.09751; min-p, https://arxiv.org/abs/2407.01082
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def top_k(logits: Tensor, k: int) -> Tensor:
    """Keep the k largest logits of each row, and what ties with the last of them.

    Args:
        logits: (b, num_tokens).
        k: at least 1; more than there are keeps all.
    """
    kth = logits.topk(min(k, logits.shape[-1]), dim=-1).values[..., -1:]
    return logits.masked_fill(logits < kth, -math.inf)


def top_p(logits: Tensor, p: float) -> Tensor:
    """Keep the fewest most likely tokens whose probabilities reach p; the most likely one always stays.

    Args:
        logits: (b, num_tokens).
        p: in (0, 1].
    """
    if p >= 1:  # a sum in floating point may reach 1 before the last token
        return logits
    ordered, index = logits.sort(dim=-1, descending=True)
    probabilities = ordered.softmax(dim=-1)
    before = probabilities.cumsum(dim=-1) - probabilities  # what the more likely tokens already reach
    dropped = before >= p
    dropped[..., 0] = False
    return logits.masked_fill(torch.zeros_like(dropped).scatter(-1, index, dropped), -math.inf)


def min_p(logits: Tensor, p: float) -> Tensor:
    """Keep the tokens at least p times as likely as the most likely one.

    Args:
        logits: (b, num_tokens).
        p: in [0, 1].
    """
    floor = logits.amax(dim=-1, keepdim=True) + (math.log(p) if p > 0 else -math.inf)
    return logits.masked_fill(logits < floor, -math.inf)
