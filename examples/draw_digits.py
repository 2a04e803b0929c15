"""Train a text-to-image transformer on handwritten digits, generate digits from their names, and classify them.

    python examples/draw_digits.py                                   # about five minutes on two CPU cores
    python examples/draw_digits.py --attention full,conv --guidance 1
    python examples/draw_digits.py --steps 300 --out runs/quick

The data set is scikit-learn's 1,797 digits with 8 x 8 pixels and 17 grey levels, one token per pixel. Ctrl-C stops the
training early; images are then generated with the current weights.

Needs: pip install attention-zoo[examples]
"""

from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path
from typing import NamedTuple

import torch
from matplotlib.figure import Figure
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from sklearn.svm import SVC
from torch import Tensor
from torch.nn.utils import clip_grad_norm_

from attention_zoo import GreyTokenizer, TextToImageTransformer, generate_images, training

NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
TEXT_LEN = max(map(len, NAMES))
SIDE, LEVELS = 8, 17


class Digits(NamedTuple):
    """Images (n, 8, 8) with values in [0, 1], and their digits (n,)."""

    images: Tensor
    digits: Tensor


def parse_options() -> argparse.Namespace:
    """Parse and check the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add(
        "--attention",
        default="full,axial_row,axial_col,conv",
        help="attention layers, cycled over the depth (%(default)s)",
    )
    add("--dim", type=int, default=128, help="number of features (%(default)s)")
    add("--depth", type=int, default=4, help="number of layers (%(default)s)")
    add("--heads", type=int, default=4, help="number of heads, of dim / heads features each (%(default)s)")
    add("--batch", type=int, default=48, help="images per training step (%(default)s)")
    add("--lr", type=float, default=2e-3, help="peak learning rate (%(default)s)")
    add("--steps", type=int, default=800, help="training steps (%(default)s)")
    add("--guidance", type=float, default=2.0, help="classifier-free guidance scale; 1: none (%(default)s)")
    add("--temperature", type=float, default=0.9, help="sampling temperature (%(default)s)")
    add("--samples", type=int, default=10, help="images generated per digit (%(default)s)")
    add("--seed", type=int, default=0, help="random seed (%(default)s)")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="device (%(default)s)")
    add("--out", type=Path, default=Path("runs/digits"), help="output folder (%(default)s)")
    options = training.parse_options(parser)
    if options.dim % options.heads:
        parser.error(f"--heads must divide --dim, got {options.heads} and {options.dim}")
    return options


def read_digits() -> tuple[Digits, Digits]:
    """Training set (80 %) and held-out set (20 %) of the model and of the classifier."""
    found = load_digits()
    parts = train_test_split(
        found.images / (LEVELS - 1), found.target, test_size=0.2, stratify=found.target, random_state=0
    )
    images, held_out, digits, held_out_digits = (torch.tensor(part) for part in parts)
    return Digits(images.float(), digits), Digits(held_out.float(), held_out_digits)


def as_text(digits: Tensor) -> Tensor:
    """Names of the digits as bytes (n, 5), padded with 0."""
    table = torch.tensor([list(name.encode().ljust(TEXT_LEN, b"\0")) for name in NAMES])
    return table[digits]


def learning_rate(step: int, options: argparse.Namespace) -> float:
    """Linear warm-up, then cosine decay to 0."""
    warmup = max(1, options.steps // 20)
    if step < warmup:
        return options.lr * (step + 1) / warmup
    return options.lr * (1 + math.cos(math.pi * (step - warmup) / (options.steps - warmup))) / 2


@torch.no_grad()
def evaluate(model: TextToImageTransformer, data: Digits, tokenizer: GreyTokenizer, device: str) -> float:
    """Loss on held-out digits."""
    model.eval()
    loss = model.loss(as_text(data.digits).to(device), tokenizer.encode(data.images).to(device))
    model.train()
    return float(loss)


def train(model: TextToImageTransformer, train_set: Digits, held_out: Digits, options: argparse.Namespace) -> None:
    """Train for all steps, or until Ctrl-C."""
    tokenizer = GreyTokenizer(height=SIDE, width=SIDE, levels=LEVELS)
    text, image = as_text(train_set.digits).to(options.device), tokenizer.encode(train_set.images).to(options.device)
    weights = list(model.parameters())
    groups = [
        {"params": [weight for weight in weights if weight.ndim > 1], "weight_decay": 0.1},
        {"params": [weight for weight in weights if weight.ndim <= 1], "weight_decay": 0.0},  # norms and biases
    ]
    optimizer = torch.optim.AdamW(groups, lr=options.lr, betas=(0.9, 0.95))
    with training.StopRequest() as stop, training.Progress(options.steps) as progress:
        for step in range(options.steps):
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, options)
            rows = torch.randint(len(text), (options.batch,))
            loss = model.loss(text[rows], image[rows], null_prob=0.1)
            optimizer.zero_grad()
            loss.backward()
            clip_grad_norm_(weights, 1.0)
            optimizer.step()
            progress.update(f"loss {loss.item():.3f}")
            if (step + 1) % max(1, options.steps // 6) == 0:
                score = evaluate(model, held_out, tokenizer, options.device)
                progress.write(f"step {step + 1}: loss {score:.3f} on held-out digits")
            if stop.made:
                progress.write(f"stopped after step {step + 1}")
                return


def sample(model: TextToImageTransformer, options: argparse.Namespace) -> Digits:
    """Generate the same number of images of every digit."""
    digits = torch.arange(len(NAMES)).repeat_interleave(options.samples)
    generator = torch.Generator(options.device).manual_seed(options.seed)
    images = generate_images(
        model,
        GreyTokenizer(height=SIDE, width=SIDE, levels=LEVELS),
        as_text(digits).to(options.device),
        guidance=options.guidance,
        temperature=options.temperature,
        generator=generator,
        progress=True,
    )
    return Digits(images.cpu(), digits)


def plot(generated: Digits, predicted: Tensor, path: Path) -> None:
    """Plot one row per digit, with the prediction in red where the classifier disagrees."""
    columns = len(generated.digits) // len(NAMES)
    figure = Figure(figsize=(0.8 * columns + 0.8, 0.8 * len(NAMES)), layout="constrained")
    grid = figure.subplots(len(NAMES), columns, squeeze=False)
    for axes, image, digit, prediction in zip(grid.flat, generated.images, generated.digits, predicted, strict=True):
        axes.imshow(image, cmap="gray_r", vmin=0, vmax=1)
        axes.set(xticks=[], yticks=[])
        if digit != prediction:
            axes.set_title(f"{int(prediction)}?", color="red", fontsize=8, pad=1)
    for axes, name in zip(grid[:, 0], NAMES, strict=True):
        axes.set_ylabel(name, rotation=0, ha="right", va="center")
    figure.savefig(path, dpi=120)


def main() -> None:
    """Train, generate, classify."""
    options = parse_options()
    torch.manual_seed(options.seed)
    train_set, held_out = read_digits()
    classifier = SVC(gamma=0.05).fit(train_set.images.flatten(1), train_set.digits)
    try:
        model = TextToImageTransformer(
            num_text_tokens=128,
            text_len=TEXT_LEN,
            num_image_tokens=LEVELS,
            height=SIDE,
            width=SIDE,
            dim=options.dim,
            depth=options.depth,
            attention=[
                (name, {"heads": options.heads, "dim_head": options.dim // options.heads})
                for name in options.attention.split(",")
            ],
            ff_dropout=0.3,
        ).to(options.device)
    except ValueError as error:
        sys.exit(f"error: {error}")
    print(f"digits: {len(train_set.digits):,} for training, {len(held_out.digits)} held out")
    print(f"model: {sum(weight.numel() for weight in model.parameters()):,} parameters on {options.device}")
    train(model, train_set, held_out, options)
    options.out.mkdir(parents=True, exist_ok=True)
    model.save(options.out)
    generated = sample(model, options)
    predicted = torch.tensor(classifier.predict(generated.images.flatten(1)))
    plot(generated, predicted, options.out / "digits.png")
    score = float((predicted == generated.digits).float().mean())
    real = float((torch.tensor(classifier.predict(held_out.images.flatten(1))) == held_out.digits).float().mean())
    copies = int((torch.cdist(generated.images.flatten(1), train_set.images.flatten(1)).amin(1) < 1e-3).sum())
    print(f"Classifier accuracy: {score:.0%} of {len(predicted)} generated digits, {real:.0%} of held-out digits.")
    print(f"{copies} of the generated digits are copies of training digits.")
    print(f"The model and digits.png are in {options.out}.")


if __name__ == "__main__":
    main()
