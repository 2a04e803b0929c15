"""Losses that ignore padding."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from attention_zoo.ops.precision import at_least_float32, no_autocast


def masked_cross_entropy(logits: Tensor, targets: Tensor, mask: Tensor | None = None) -> Tensor:
    """Mean cross entropy over the valid positions.

    Args:
        logits: (b, n, num_tokens).
        targets: (b, n), token ids.
        mask: (b, n) bool, True = a valid target. None: all are valid.

    Returns:
        A scalar in nats, in at least float32; 0 with zero gradient without a valid position, also in an empty batch.
    """
    with no_autocast(logits):
        rows = at_least_float32(logits).flatten(0, 1)
        losses = F.cross_entropy(rows, targets.long().flatten(), reduction="none").view(targets.shape)
        if mask is None:
            return losses.sum() / max(losses.numel(), 1)
        # not a product: the loss of a masked position may be infinite or NaN
        losses = torch.where(mask, losses, losses.new_zeros(()))
        return losses.sum() / mask.sum().clamp(min=1)


def next_token_loss(
    logits: Tensor, tokens: Tensor, mask: Tensor | None = None, document_ids: Tensor | None = None
) -> Tensor:
    """Mean cross entropy of every token given the tokens before it.

    Args:
        logits: (b, n - 1, num_tokens), computed from `tokens[:, :-1]`.
        tokens: (b, n), token ids.
        mask: (b, n) bool, True = a valid token. A target counts if it and the token before it are valid.
        document_ids: (b, n) int. A target counts if the token before it has the same id.

    Returns:
        A scalar in nats, as `masked_cross_entropy`.
    """
    return masked_cross_entropy(logits, tokens[:, 1:], _pairs(mask, document_ids))


def count_next_tokens(tokens: Tensor, mask: Tensor | None = None, document_ids: Tensor | None = None) -> Tensor:
    """The number of targets of `next_token_loss` for tokens (b, n), a scalar int64."""
    pairs = _pairs(mask, document_ids)
    return torch.full((), tokens[:, 1:].numel(), device=tokens.device) if pairs is None else pairs.sum()


def _pairs(mask: Tensor | None, document_ids: Tensor | None) -> Tensor | None:
    """(b, n - 1) bool, True where a token predicts the next one; None: everywhere."""
    pairs = None if mask is None else mask[:, :-1] & mask[:, 1:]
    if document_ids is None:
        return pairs
    same = document_ids[:, :-1] == document_ids[:, 1:]
    return same if pairs is None else pairs & same


@dataclass(frozen=True)
class LossTerm:
    """A term of a loss.

    Attributes:
        mean: scalar, mean over `count` targets; 0 without targets.
        count: scalar, number of targets.
        weight: factor of the mean in the loss.
    """

    mean: Tensor
    count: Tensor
    weight: float = 1.0


def total_loss(terms: Sequence[LossTerm]) -> Tensor:
    """The weighted sum of the terms' means."""
    return sum((term.weight * term.mean for term in terms[1:]), terms[0].weight * terms[0].mean)
