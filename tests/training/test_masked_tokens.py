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


@pytest.mark.slow
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
        mask_tokens(TOKENS, 1, probability=0)


TOKENS = torch.zeros(2, 3, dtype=torch.uint8)
BAD = {
    "a float mask token": ({"mask_token": 1.5}, TypeError, "mask_token must be an int, got mask_token=1.5"),
    "no mask token": ({"mask_token": None}, TypeError, "mask_token must be an int, got mask_token=None"),
    "a negative mask token": ({"mask_token": -1}, ValueError, "mask_token must be at least 0, got mask_token=-1"),
    "a large mask token": ({"mask_token": 256}, ValueError, r"mask_token must lie in \[0, 255\], got mask_token=256"),
    "a string": ({"probability": "0.1"}, TypeError, "probability must be a number, got probability='0.1'"),
    "float tokens": (
        {"tokens": TOKENS.float()},
        TypeError,
        "tokens must be an integer tensor, got dtype torch.float32",
    ),
    "no tokens": ({"tokens": TOKENS[:, :0]}, ValueError, r"tokens must be \(b, n\) with n >= 1, got shape \(2, 0\)"),
    "one row": ({"tokens": TOKENS[0]}, ValueError, r"tokens must be \(b, n\) .*, got shape \(3,\)"),
}


@pytest.mark.parametrize(("changes", "error", "message"), BAD.values(), ids=BAD)
def test_invalid_arguments_raise(changes: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        mask_tokens(**{"tokens": TOKENS, "mask_token": 1, **changes})


@pytest.mark.parametrize("rows", [0, 2])
def test_the_loss_without_valid_tokens_is_0_with_gradient_0(rows: int) -> None:
    model, tokens = small(causal=False), torch.zeros(rows, 5, dtype=torch.int64)
    loss = masked_token_loss(model, tokens, 30, mask=torch.zeros(rows, 5, dtype=torch.bool))
    loss.backward()
    assert loss.item() == 0
    assert not any(p.grad.any() for p in model.parameters() if p.grad is not None)
