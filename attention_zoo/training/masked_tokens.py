"""Masked-token training of bidirectional models.

Paper: BERT, https://arxiv.org/abs/1810.04805
Differs: every selected token is replaced by the mask token; none is kept or replaced by a random one.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from attention_zoo._checks import check_in, check_int, check_integers, check_padding
from attention_zoo.ops.losses import masked_cross_entropy


def mask_tokens(
    tokens: Tensor,
    mask_token: int,
    *,
    probability: float = 0.15,
    mask: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    """Replace random valid tokens by a mask token.

    Args:
        tokens: (b, n), n >= 1, of any integer dtype; not modified.
        mask_token: id of the mask token, in the range of the dtype of `tokens`.
        probability: probability that a valid token is replaced. In a row where none is selected, one is replaced.
        mask: (b, n) bool, True = a valid token.
        generator: random number generator, on the device of `tokens`.

    Returns:
        The masked tokens (b, n), and (b, n) bool, True = a replaced token.

    Raises:
        TypeError: `tokens` or `mask_token` is not of integers, or `probability` is not a number.
        ValueError: `probability` is outside (0, 1], `mask_token` outside its range, or a shape does not fit.
    """
    check_in("(0, 1]", probability=probability)
    check_integers(tokens=tokens)
    if tokens.ndim != 2 or not tokens.shape[1]:
        raise ValueError(f"tokens must be (b, n) with n >= 1, got shape {tuple(tokens.shape)}")
    check_int(0, mask_token=mask_token)
    check_in(f"[0, {torch.iinfo(tokens.dtype).max}]", mask_token=mask_token)
    check_padding(mask, tokens)
    drawn = torch.rand(tokens.shape, device=tokens.device, generator=generator)
    if mask is not None:
        drawn = drawn.masked_fill(~mask, 2.0)
    replaced = (drawn < probability) | ((drawn == drawn.amin(dim=1, keepdim=True)) & (drawn <= 1))
    return tokens.masked_fill(replaced, mask_token), replaced


def masked_token_loss(
    model: Callable[..., Tensor],
    tokens: Tensor,
    mask_token: int,
    *,
    probability: float = 0.15,
    mask: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Mean cross entropy, in nats, of the replaced tokens given the masked sequence; 0 without a valid token.

    Args:
        model: bidirectional; `model(tokens, mask=mask)` returns logits (b, n, num_tokens).
        tokens, mask_token, probability, mask, generator: see `mask_tokens`.
    """
    inputs, hidden = mask_tokens(tokens, mask_token, probability=probability, mask=mask, generator=generator)
    return masked_cross_entropy(model(inputs, mask=mask), tokens, hidden)
