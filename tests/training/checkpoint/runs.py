"""A small training run, whose losses show whether it was resumed exactly."""

from __future__ import annotations

from typing import Any

import torch

from attention_zoo import LanguageModel
from attention_zoo.training import as_tokens, random_batch

TEXT = as_tokens(bytes(range(256)) * 4)


def make_parts(seed: int = 0, **changed: Any) -> dict[str, Any]:
    """A small run with dropout, which uses torch's default random number generator."""
    torch.manual_seed(seed)
    sizes = {"num_tokens": 256, "dim": 16, "depth": 1, "heads": 2, "dim_head": 8, "ff_dropout": 0.2}
    model = LanguageModel(**{**sizes, **changed})
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    return {
        "model": model,
        "optimizer": optimizer,
        "schedule": torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.9**step),
        "generator": torch.Generator().manual_seed(seed),
    }


def train(parts: dict[str, Any], steps: int) -> list[float]:
    losses = []
    for _ in range(steps):
        loss = parts["model"].loss(random_batch(TEXT, 2, 16, generator=parts["generator"]))
        parts["optimizer"].zero_grad()
        loss.backward()
        parts["optimizer"].step()
        parts["schedule"].step()
        losses.append(loss.item())
    return losses
