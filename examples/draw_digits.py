"""Train a transformer on handwritten digits and their names, let it draw from names, and have a classifier judge.

    python examples/draw_digits.py                                   # about five minutes on two CPU cores
    python examples/draw_digits.py --attention full,conv --guidance 1
    python examples/draw_digits.py --steps 300 --out runs/quick

The digits are scikit-learn's 1,797 real ones, 8 x 8 pixels in 17 shades of grey: one token a pixel. Ctrl-C ends the
training early and draws with what was learned.

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
from tqdm import tqdm

from attention_zoo import GreyTokenizer, TextToImageTransformer, generate_images, training

NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
TEXT_LEN = max(map(len, NAMES))
SIDE, SHADES = 8, 17


class Digits(NamedTuple):
    """Images (n, 8, 8) in 0 ... 1, and which digit each is."""

    images: Tensor
    digits: Tensor


def parse_options() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--attention", default="full,axial_row,axial_col,conv", help="blocks, cycled over the layers (%(default)s)")
    add("--dim", type=int, default=128, help="features (%(default)s)")
    add("--depth", type=int, default=4, help="layers (%(default)s)")
    add("--heads", type=int, default=4, help="heads, each of dim / heads features (%(default)s)")
    add("--batch", type=int, default=48, help="images in a step (%(default)s)")
    add("--lr", type=float, default=2e-3, help="the highest learning rate (%(default)s)")
    add("--steps", type=int, default=800, help="steps of training (%(default)s)")
    add(
        "--guidance",
        type=float,
        default=2.0,
        help="how far to follow the name; 1 is not at all beyond it (%(default)s)",
    )
    add("--temperature", type=float, default=0.9, help="of the drawing (%(default)s)")
    add("--samples", type=int, default=10, help="drawings of each digit (%(default)s)")
    add("--seed", type=int, default=0, help="start of all randomness (%(default)s)")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="where to train (%(default)s)")
    add("--out", type=Path, default=Path("runs/digits"), help="folder of the results (%(default)s)")
    options = parser.parse_args()
    if options.heads < 1 or options.dim % options.heads:
        parser.error(f"--heads must divide --dim, got {options.heads} and {options.dim}")
    for name in ("steps", "samples", "batch"):
        if getattr(options, name) < 1:
            parser.error(f"--{name} must be at least 1, got {getattr(options, name)}")
    return options


def read_digits() -> tuple[Digits, Digits]:
    """Four fifths of the digits to learn from, and a fifth that the model and the classifier never see."""
    found = load_digits()
    parts = train_test_split(
        found.images / (SHADES - 1), found.target, test_size=0.2, stratify=found.target, random_state=0
    )
    images, held_out, digits, held_out_digits = (torch.tensor(part) for part in parts)
    return Digits(images.float(), digits), Digits(held_out.float(), held_out_digits)


def as_text(digits: Tensor) -> Tensor:
    """The digits' names as bytes, (n, 5), padded with 0."""
    table = torch.tensor([list(name.encode().ljust(TEXT_LEN, b"\0")) for name in NAMES])
    return table[digits]


def learning_rate(step: int, options: argparse.Namespace) -> float:
    """Up along a line, then down along a cosine to nothing."""
    warmup = max(1, options.steps // 20)
    if step < warmup:
        return options.lr * (step + 1) / warmup
    return options.lr * (1 + math.cos(math.pi * (step - warmup) / (options.steps - warmup))) / 2


@torch.no_grad()
def evaluate(model: TextToImageTransformer, data: Digits, tokenizer: GreyTokenizer, device: str) -> float:
    """The loss on digits that were held out."""
    model.eval()
    loss = model.loss(as_text(data.digits).to(device), tokenizer.encode(data.images).to(device))
    model.train()
    return float(loss)


def train(model: TextToImageTransformer, seen: Digits, unseen: Digits, options: argparse.Namespace) -> None:
    """Take all steps, or as many as there are until Ctrl-C."""
    tokenizer = GreyTokenizer(height=SIDE, width=SIDE, levels=SHADES)
    text, image = as_text(seen.digits).to(options.device), tokenizer.encode(seen.images).to(options.device)
    weights = list(model.parameters())
    groups = [
        {"params": [weight for weight in weights if weight.ndim > 1], "weight_decay": 0.1},
        {"params": [weight for weight in weights if weight.ndim <= 1], "weight_decay": 0.0},  # gains and biases
    ]
    optimizer = torch.optim.AdamW(groups, lr=options.lr, betas=(0.9, 0.95))
    bar = tqdm(total=options.steps, unit="step", dynamic_ncols=True, smoothing=0.05)
    with training.StopRequest() as stop, bar:
        for step in range(options.steps):
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, options)
            rows = torch.randint(len(text), (options.batch,))
            loss = model.loss(text[rows], image[rows], null_prob=0.1)
            optimizer.zero_grad()
            loss.backward()
            clip_grad_norm_(weights, 1.0)
            optimizer.step()
            bar.set_postfix_str(f"loss {float(loss):.3f}", refresh=False)
            bar.update()
            if (step + 1) % max(1, options.steps // 6) == 0:
                bar.write(
                    f"step {step + 1}: loss {evaluate(model, unseen, tokenizer, options.device):.3f} on unseen digits"
                )
            if stop.made:
                bar.write(f"stopped after step {step + 1}")
                return


def draw(model: TextToImageTransformer, options: argparse.Namespace) -> Digits:
    """The same number of images of every digit."""
    digits = torch.arange(len(NAMES)).repeat_interleave(options.samples)
    generator = torch.Generator(options.device).manual_seed(options.seed)
    images = generate_images(
        model,
        GreyTokenizer(height=SIDE, width=SIDE, levels=SHADES),
        as_text(digits).to(options.device),
        guidance=options.guidance,
        temperature=options.temperature,
        generator=generator,
        progress=True,
    )
    return Digits(images.cpu(), digits)


def plot(drawn: Digits, named: Tensor, path: Path) -> None:
    """One row per digit; a drawing that the classifier calls something else has its answer in red."""
    columns = len(drawn.digits) // len(NAMES)
    figure = Figure(figsize=(0.8 * columns + 0.8, 0.8 * len(NAMES)), layout="constrained")
    grid = figure.subplots(len(NAMES), columns, squeeze=False)
    for axes, image, digit, name in zip(grid.flat, drawn.images, drawn.digits, named, strict=True):
        axes.imshow(image, cmap="gray_r", vmin=0, vmax=1)
        axes.set(xticks=[], yticks=[])
        if digit != name:
            axes.set_title(f"{int(name)}?", color="red", fontsize=8, pad=1)
    for axes, name in zip(grid[:, 0], NAMES, strict=True):
        axes.set_ylabel(name, rotation=0, ha="right", va="center")
    figure.savefig(path, dpi=120)


def main() -> None:
    """Train, draw, judge."""
    options = parse_options()
    torch.manual_seed(options.seed)
    seen, unseen = read_digits()
    judge = SVC(gamma=0.05).fit(seen.images.flatten(1), seen.digits)
    try:
        model = TextToImageTransformer(
            num_text_tokens=128,
            text_len=TEXT_LEN,
            num_image_tokens=SHADES,
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
    print(f"digits: {len(seen.digits):,} to learn from, {len(unseen.digits)} unseen")
    print(f"model: {sum(weight.numel() for weight in model.parameters()):,} parameters on {options.device}")
    train(model, seen, unseen, options)
    options.out.mkdir(parents=True, exist_ok=True)
    model.save(options.out)
    drawn = draw(model, options)
    named = torch.tensor(judge.predict(drawn.images.flatten(1)))
    plot(drawn, named, options.out / "digits.png")
    real = float((torch.tensor(judge.predict(unseen.images.flatten(1))) == unseen.digits).float().mean())
    score = float((named == drawn.digits).float().mean())
    copies = int((torch.cdist(drawn.images.flatten(1), seen.images.flatten(1)).amin(1) < 1e-3).sum())
    print(
        f"The classifier names {score:.0%} of {len(named)} drawings as asked for, and {real:.0%} of real unseen digits."
    )
    print(f"{copies} of the drawings are copies of digits that the model learned from.")
    print(f"The model and digits.png are in {options.out}.")


if __name__ == "__main__":
    main()
