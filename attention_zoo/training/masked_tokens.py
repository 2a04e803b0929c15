"""Masked-token training of bidirectional models.

Paper: BERT, https://arxiv.org/abs/1810.04805
Differs: every selected token is replaced by the mask token; none is kept or replaced by a random one.
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
    """Replace random valid tokens by a mask token.

    Args:
        tokens: (b, n) int; not modified.
        mask_token: id of the mask token.
        probability: probability that a valid token is replaced. In a row where none is selected, one is replaced.
        mask: (b, n) bool, True = a valid token.
        generator: random number generator, on the device of `tokens`.

    Returns:
        The masked tokens (b, n), and (b, n) bool, True = a replaced token.

    Raises:
        ValueError: `probability` is outside (0, 1].
    """
    if not 0 < probability <= 1:
        raise ValueError(f"probability must lie in (0, 1], got {probability=}")
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
    """Mean cross entropy, in nats, of the replaced tokens given the masked sequence.

    Args:
        model: bidirectional; `model(tokens, mask=mask)` returns logits (b, n, num_tokens).
        tokens, mask_token, probability, mask, generator: see `mask_tokens`.
    """
    inputs, hidden = mask_tokens(tokens, mask_token, probability=probability, mask=mask, generator=generator)
    return masked_cross_entropy(model(inputs, mask=mask), tokens, hidden)
