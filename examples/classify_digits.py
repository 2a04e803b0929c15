"""Classify handwritten digits with an encoder of image patches.

Trains on 1,400 of scikit-learn's 8 x 8 digits and measures the accuracy on the other 397. A minute on two CPU cores.

    python examples/classify_digits.py [--attention full] [--out digits_classifier]
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from sklearn.datasets import load_digits
from torch import Tensor

from attention_zoo import Encoder, image_to_patches, training

TRAIN = 1400  # images; the others measure the accuracy


def digits() -> tuple[Tensor, Tensor]:
    """Patches (1797, 16, 4) of 2 x 2 pixels in [0, 1], and the digits (1797,), in a random order."""
    data = load_digits()
    order = torch.randperm(len(data.target), generator=torch.Generator().manual_seed(0))
    images = torch.tensor(data.images, dtype=torch.float32)[:, None] / 16
    return image_to_patches(images, 2)[order], torch.tensor(data.target)[order]


def accuracy(model: Encoder, patches: Tensor, labels: Tensor) -> float:
    """The fraction of digits that the model names."""
    model.eval()
    with torch.no_grad():
        right = model(patches).argmax(-1) == labels
    model.train()
    return right.float().mean().item()


def main() -> None:
    """Train, measure and save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--attention", default="full", help="name of a block that need not be causal (default: full)")
    parser.add_argument("--steps", type=int, default=800, help="training steps (%(default)s)")
    parser.add_argument("--out", type=Path, default=Path("digits_classifier"), help="folder of the model")
    options = training.parse_options(parser)
    torch.manual_seed(0)
    patches, labels = digits()
    try:
        model = Encoder(
            patch_dim=4,
            dim=64,
            depth=3,
            heads=4,
            dim_head=16,
            num_classes=10,
            attention=options.attention,
            positions="learned",
            max_seq_len=16,
            ff_dropout=0.1,
        )
    except ValueError as error:  # unknown or unfit attention
        sys.exit(f"error: {error}")
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=options.steps)
    with training.Progress(options.steps) as progress:
        for _ in range(options.steps):
            rows = torch.randint(TRAIN, (64,))
            loss = model.loss(patches[rows], labels[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            progress.update(f"loss {loss.item():.3f}")
    model.eval()
    model.save(options.out)
    print(f"accuracy on {len(labels) - TRAIN} unseen digits: {accuracy(model, patches[TRAIN:], labels[TRAIN:]):.1%}")
    print(f"model: {options.out}")


if __name__ == "__main__":
    main()
