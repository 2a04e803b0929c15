"""Masked-token training: hide some tokens, predict them from both sides.

Paper: BERT, https://arxiv.org/abs/1810.04805 (every chosen token is hidden; none is replaced by a random one)
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from attention_zoo._checks import check_padding
from attention_zoo.ops.losses import masked_cross_entropy


def mask_tokens(
    tokens: Tensor,
    mask_token: int,
    *,
    probability: float = 0.15,
    mask: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    """Hide real tokens at random.

    Args:
        tokens: (b, n) int; not modified.
        mask_token: the id that stands for a hidden token.
        probability: with which each real token is hidden; a row whose tokens all stayed gets one hidden.
        mask: (b, n) bool, True = a real token.
        generator: source of randomness, on the device of the tokens.

    Returns:
        The tokens with some hidden (b, n), and which (b, n) bool.

    Raises:
        ValueError: probability lies outside (0, 1].
    """
    if not 0 < probability <= 1:
        raise ValueError(f"probability must lie in (0, 1], got {probability=}")
    check_padding(mask, tokens)
    drawn = torch.rand(tokens.shape, device=tokens.device, generator=generator)
    if mask is not None:
        drawn = drawn.masked_fill(~mask, 2.0)
    hidden = (drawn < probability) | ((drawn == drawn.amin(dim=1, keepdim=True)) & (drawn <= 1))
    return tokens.masked_fill(hidden, mask_token), hidden


def masked_token_loss(
    model: Callable[..., Tensor],
    tokens: Tensor,
    mask_token: int,
    *,
    probability: float = 0.15,
    mask: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Mean cross entropy in nats of the hidden tokens, given all that was not hidden.

    Args:
        model: gives logits (b, n, num_tokens) for tokens (b, n) and a mask; it sees both ways.
        tokens, mask_token, probability, mask, generator: see `mask_tokens`.
    """
    inputs, hidden = mask_tokens(tokens, mask_token, probability=probability, mask=mask, generator=generator)
    return masked_cross_entropy(model(inputs, mask=mask), tokens, hidden)
