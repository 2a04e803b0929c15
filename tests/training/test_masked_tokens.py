"""`mask_tokens` and `masked_token_loss`."""

from __future__ import annotations

import pytest
import torch

from attention_zoo.training import mask_tokens, masked_token_loss
from tests.models.test_multi_stream import small


def test_mask_tokens_replaces_valid_tokens_only() -> None:
    tokens, mask = torch.randint(0, 30, (50, 20)), torch.rand(50, 20) < 0.5
    mask[:, 0] = True
    before = tokens.clone()
    hidden, which = mask_tokens(tokens, 30, probability=0.3, mask=mask)
    assert torch.equal(tokens, before)
    assert not (which & ~mask).any()
    assert which.any(dim=1).all()
    assert torch.equal(hidden, torch.where(which, torch.full_like(tokens, 30), tokens))
    assert 0.2 < which.sum() / mask.sum() < 0.45


def test_bidirectional_model_learns_masked_tokens() -> None:
    model = small(causal=False).train()
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    tokens = (torch.arange(12) + torch.randint(0, 18, (16, 1))) % 30  # each token tells its neighbours
    losses = []
    for _ in range(100):
        loss = masked_token_loss(model, tokens, 30)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-5:]) / 5 < 0.5 * losses[0]


def test_probability_outside_its_range_raises() -> None:
    with pytest.raises(ValueError, match=r"probability must lie in \(0, 1\]"):
        mask_tokens(torch.zeros(1, 3), 1, probability=0)
