"""Build a classifier from a `Stack` with a user-defined attention layer, and run the contract checks on that layer.

python examples/compose_by_hand.py
"""

from __future__ import annotations

import argparse

import torch
from torch import Tensor, nn

from attention_zoo import Rotary, Stack, training
from attention_zoo.testing import check_block


class MovingAverage(nn.Module):
    """Causal moving average: the mean of a token and of the valid tokens among the `span` tokens before it."""

    def __init__(self, dim: int, span: int = 3) -> None:
        super().__init__()
        self.span = span
        self.to_out = nn.Linear(dim, dim, bias=False)

    def forward(self, x: Tensor, *, mask: Tensor | None = None) -> Tensor:
        n = x.shape[1]
        distance = torch.arange(n, device=x.device)[:, None] - torch.arange(n, device=x.device)
        weights = ((distance >= 0) & (distance <= self.span)).to(x.dtype)  # (n, n)
        if mask is not None:
            weights = weights * mask[:, None, :]  # (b, n, n)
        return self.to_out(weights @ x / weights.sum(-1, keepdim=True).clamp(min=1))


class Classifier(nn.Module):
    """Four layers (moving average, cosine-sim, grouped-query attention, moving average), then the mean over tokens."""

    def __init__(self, num_tokens: int, classes: int, dim: int = 64) -> None:
        super().__init__()
        self.embed = nn.Embedding(num_tokens, dim)
        self.body = Stack(
            dim,
            depth=4,
            attention=[MovingAverage, "cosine_sim", ("full", {"kv_heads": 2}), MovingAverage],
            feedforward="swiglu",
            heads=4,
            dim_head=16,
            rotary=Rotary(),  # passed to the layers that have this argument
        )
        self.to_logits = nn.Linear(dim, classes)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.to_logits(self.body(self.embed(tokens)).mean(dim=1))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=250, help="training steps (%(default)s)")
    steps = training.parse_options(parser).steps
    torch.manual_seed(0)
    model = Classifier(num_tokens=16, classes=16)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    with training.Progress(steps) as progress:
        for step in range(1, steps + 1):  # the class is the token after the first 0
            tokens = torch.randint(0, 16, (64, 24))
            tokens[:, 12] = 0
            first = (tokens == 0).int().argmax(dim=1).clamp(max=22)
            loss = nn.functional.cross_entropy(model(tokens), tokens[torch.arange(64), first + 1])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            progress.update(f"loss {loss.item():.3f}")
            if step % 50 == 0:
                progress.write(f"step {step}: loss {loss.item():.3f}")

    print("\nContract checks of MovingAverage:")
    print(check_block(lambda: MovingAverage(32), dim=32, causal=True, lengths=(1, 2, 7, 65), strict=True))
    print("The failed check is what remains to be written: errors for invalid arguments.")


if __name__ == "__main__":
    main()
