"""Swap half of the attention layers of a trained language model for gate loops and windows, and train on.

    python examples/train_language_model.py                        # the original, if there is none yet
    python examples/swap_attention.py                              # a gate loop and a window, a few minutes
    python examples/swap_attention.py --attention window --layers 1,2,3
    python examples/swap_attention.py --model runs/mine --match 0  # cross-entropy alone

Projections that fit are copied into the new layers. The loss is the cross-entropy and, for every new layer, the
squared difference between its output and that of the frozen old layer for the same input, relative to the old one's.
Prints bits per byte of validation text against the fraction of the original's training steps, beside those of the
original itself when it trains on for as many steps, and the state and time of decoding before and after.

Needs: pip install attention-zoo[examples]; with attention-zoo[fast] the recurrence runs at memory speed.
"""

from __future__ import annotations

import argparse
import inspect
import math
import sys
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from time import thread_time
from typing import Any, NamedTuple

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_

from attention_zoo import BLOCKS, LanguageModel, replace_block, training

# The norm of a gate loop gives its output the scale of the softmax's, which weights that sum to one had.
OPTIONS: dict[str, dict[str, Any]] = {"gate_loop": {"sub_norm": True}, "window": {"window": 32, "sinks": 4}}
EVALUATED = (1 / 32, 1 / 16, 1 / 8, 1 / 4, 1 / 2, 3 / 4, 1)  # fractions of the steps
LENGTHS = (256, 1024, 4096, 16384)  # bytes of context of the measured decoding steps
TIMED = 100  # decoding steps per length


class Point(NamedTuple):
    """An evaluation: steps so far, bits per byte, and the difference of each new layer to the old one."""

    step: int
    bits: float
    differences: list[float]


class Decoding(NamedTuple):
    """The next byte after a context: size of the state, and mean CPU time, which other programs do not add to."""

    length: int
    state_bytes: int
    ms: float


class Found(NamedTuple):
    """Training steps and (step, bits per byte) of the original; evaluations with new layers, and without; decoding of
    both."""

    steps: int
    curve: list[tuple[int, float]]
    swapped: list[Point]
    unchanged: list[Point]
    costs: list[list[Decoding]]


def parse_options() -> argparse.Namespace:
    """Parse and check the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    trained = Path("runs/language_model")
    add("--model", type=Path, default=trained, help="output folder of train_language_model.py (%(default)s)")
    add("--attention", default="gate_loop,window", help="new layers, cycled over --layers (%(default)s)")
    add("--layers", type=indices, help="indices of the layers to swap (0,2,...: every second)")
    add("--match", type=float, default=1.0, help="weight of the difference to the old layers (%(default)s)")
    add("--steps", type=int, default=650, help="training steps (%(default)s)")
    add("--lr", type=float, default=1e-3, help="peak learning rate (%(default)s)")
    add("--seed", type=int, default=0, help="random seed (%(default)s)")
    add("--data", help="text file, or folder of text files (those that the original was trained on)")
    add("--out", type=Path, default=Path("runs/swap_attention"), help="output folder (%(default)s)")
    options = training.parse_options(parser)
    if not 0 <= options.match < math.inf:
        parser.error(f"--match must be at least 0, got {options.match}")
    return options


def indices(text: str) -> list[int]:
    """The layers in a list such as 0,2."""
    return sorted({int(part) for part in text.split(",")})


def read_run(folder: Path) -> tuple[LanguageModel, dict[str, Any], list[tuple[int, float]]]:
    """A trained model, its training options, and its bits per byte of validation text during training."""
    model = LanguageModel.load(folder)
    one = folder / "checkpoint.pt"
    run = training.read_checkpoint(one) if one.exists() else training.read_sharded(folder / "checkpoint")
    return model, run.extra["options"], run.extra["curves"]["validation"]


class Difference:
    """Mean squared difference between the outputs of a new block and an old one for the inputs of the new one,
    relative to the mean square of the old one's, in every forward pass of the new one."""

    def __init__(self, layer: int, new: nn.Module, old: nn.Module) -> None:
        self.layer, self.old = layer, old
        self.value = torch.zeros(())
        self.hook = new.register_forward_hook(self.compare, with_kwargs=True)

    def compare(self, new: nn.Module, args: Any, kwargs: dict[str, Any], output: Tensor) -> None:
        with torch.no_grad():
            want = self.old(*args, **kwargs)
        self.value = (output - want).square().mean() / want.square().mean()


def swap(model: LanguageModel, original: LanguageModel, options: argparse.Namespace) -> list[Difference]:
    """Replace layers of `model`, a copy of `original`, and print what is new in them."""
    names, differences = options.attention.split(","), []
    layers = range(0, len(model.stack.layers), 2) if options.layers is None else options.layers
    for place, layer in enumerate(layers):
        name = names[place % len(names)]
        found = replace_block(model, layer, spec_like(name, original, layer), init="copy")
        new, old = block(model, layer), block(original, layer)
        print(f"layer {layer}: {type(old).__name__} -> {type(new).__name__}")
        print(f"  copied: {', '.join(found.copied) or 'nothing'}\n  new: {', '.join(found.new) or 'nothing'}")
        differences.append(Difference(layer, new, old))
    return differences


def spec_like(name: str, model: LanguageModel, layer: int) -> Any:
    """A new block with the heads of a layer of the model, where it takes them, so that its projections fit."""
    if name not in BLOCKS or not 0 <= layer < len(model.stack.layers):
        return name  # which `replace_block` refuses
    old = block(model, layer)
    heads = {part: getattr(old, part) for part in ("heads", "kv_heads", "dim_head") if hasattr(old, part)}
    if len(heads) > 1:
        heads["dim_inner"] = heads["heads"] * heads["dim_head"]
    takes = inspect.signature(BLOCKS[name]).parameters
    return name, {part: size for part, size in heads.items() if part in takes} | OPTIONS.get(name, {})


def block(model: LanguageModel, layer: int) -> Any:
    """The first block of a layer."""
    return model.stack.layers[layer].sublayers[0].block  # type: ignore[index, union-attr]


@torch.no_grad()
def evaluate(model: LanguageModel, texts: Tensor, step: int, differences: Sequence[Difference]) -> Point:
    """Bits per byte of (windows, bytes) of validation text, and the differences over it."""
    model.eval()
    bits, parts = 0.0, [0.0] * len(differences)
    for tokens in texts.split(8):
        share = len(tokens) / len(texts)
        bits += share * float(model.loss(tokens)) / math.log(2)
        parts = [part + share * float(found.value) for part, found in zip(parts, differences, strict=True)]
    model.train()
    return Point(step, bits, parts)


def train(
    name: str, model: LanguageModel, text: training.Text, run: Any, options: Any, differences: Sequence[Difference] = ()
) -> list[Point]:
    """Train on random parts of the text, as many bytes per step as the original. Returns the evaluations."""
    tokens = training.as_tokens(text.training)
    texts = training.windows(training.as_tokens(text.validation), run["seq_len"] + 1, at_most=256)
    groups = [
        {"params": [weight for weight in model.parameters() if weight.ndim > 1], "weight_decay": 0.1},
        {"params": [weight for weight in model.parameters() if weight.ndim <= 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=options.lr, betas=(0.9, 0.95), fused=True)
    steps, warmup = options.steps, max(1, options.steps // 20)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warmup, 0.05 + 0.475 * (1 + math.cos(math.pi * step / steps)))
    )
    generator = torch.Generator().manual_seed(options.seed)
    due = {max(1, round(fraction * steps)) for fraction in EVALUATED}
    points = [evaluate(model, texts, 0, differences)]
    with training.Progress(steps, name=name) as progress:
        for step in range(1, steps + 1):
            loss = model.loss(training.random_batch(tokens, run["batch"], run["seq_len"] + 1, generator=generator))
            apart = sum((found.value for found in differences), torch.zeros(()))
            optimizer.zero_grad()
            (loss + options.match * apart).backward()
            clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            progress.update(f"{loss.item() / math.log(2):.2f} bits/byte, difference {apart.item():.3f}")
            if step in due:
                points.append(evaluate(model, texts, step, differences))
                progress.write(f"{name}, step {step}: {points[-1].bits:.3f} bits per byte of validation text")
    return points


@torch.no_grad()
def decode(models: list[LanguageModel]) -> list[list[Decoding]]:
    """Decoding of each model, in turn, after contexts of random bytes: also longer ones than it was trained on."""
    found: list[list[Decoding]] = [[] for _ in models]
    for length in LENGTHS:
        text = torch.randint(256, (1, length + 1 + TIMED))
        inputs = [model.eval().token_embedding(text) for model in models]
        stacks = [model.stack for model in models]  # which have no longest sequence
        states = [stack.step(x[:, :length])[1] for stack, x in zip(stacks, inputs, strict=True)]
        sizes, times = [state.nbytes for state in states], [0.0 for _ in models]
        for step, index in product(range(1 + TIMED), range(len(models))):
            begin = thread_time()
            _, states[index] = stacks[index].step(inputs[index][:, length + step, None], states[index])
            times[index] += (thread_time() - begin) * (step > 0)  # the first one makes room in the buffers
        for row, size, taken in zip(found, sizes, times, strict=True):
            row.append(Decoding(length, size, 1000 * taken / TIMED))
    return found


def report(found: Found, layers: list[int]) -> str:
    """The tables of bits per byte and of decoding."""
    want, steps = found.unchanged[0].bits, found.steps
    heads = "   ".join(f"layer {layer}" for layer in layers)
    lines = [f"\n% of the original's steps   swapped   unchanged   difference: {heads}"]
    for after, same in zip(found.swapped, found.unchanged, strict=True):
        apart = "".join(f"{part:>10.3f}" for part in after.differences)
        lines.append(f"{after.step / steps:>25.1%}{after.bits:>10.3f}{same.bits:>12.3f}{'':12}{apart}")
    enough = next((point.step for point in found.swapped if point.bits <= want), None)
    reached = "not reached" if enough is None else f"reached after {enough / steps:.1%} of its training steps"
    lines += [f"the original's {want:.3f} bits per byte are {reached}", ""]
    lines.append("decoding after n bytes     before: state        time      after: state        time")
    for costs in zip(*found.costs, strict=True):
        cells = [f"{cost.state_bytes / 1024:>14,.0f} KiB{cost.ms:>9.2f} ms" for cost in costs]
        lines.append(f"{costs[0].length:>22}" + "  ".join(cells))
    return "\n".join(lines)


def plot(found: Found, path: Path) -> None:
    """Plot bits per byte against the share of the original's training, and the state against the context."""
    left, right = Figure(figsize=(11, 4.5), layout="constrained").subplots(1, 2)
    curves = {
        "layers swapped": [(point.step, point.bits) for point in found.swapped],
        "unchanged, trained on": [(point.step, point.bits) for point in found.unchanged],
        "original, from its start": found.curve,
    }
    for (label, points), style in zip(curves.items(), ("o-", "s-", ".:"), strict=True):
        left.plot([100 * step / found.steps for step, _ in points], [bits for _, bits in points], style, label=label)
    want = found.unchanged[0].bits
    left.axhline(want, color="gray", linestyle="--", label=f"original: {want:.2f}")
    left.set(xlabel="training steps, % of the original's", ylabel="bits per byte of validation text", yscale="log")
    left.yaxis.set_major_formatter("{x:.1f}")
    left.yaxis.set_minor_formatter("{x:.1f}")
    for label, costs in zip(("original", "layers swapped"), found.costs, strict=True):
        right.plot([cost.length for cost in costs], [cost.state_bytes / 1024 for cost in costs], "o-", label=label)
    right.set(xlabel="bytes of context", ylabel="decoding state in KiB", xscale="log", yscale="log")
    right.set_xticks(LENGTHS, [f"{length:,}" for length in LENGTHS], minor=False)
    right.set_xticks([], minor=True)
    left.legend()
    right.legend()
    left.figure.savefig(path, dpi=120)


def main() -> None:
    """Swap the layers, train both models, print and plot what it took."""
    options = parse_options()
    torch.manual_seed(options.seed)
    try:
        original, run, curve = read_run(options.model)
        model = LanguageModel.load(options.model)
        differences = swap(model, original.requires_grad_(False).eval(), options)
        text = training.read_text(options.data or run["data"])
        swapped = train("swapped", model, text, run, options, differences)
        unchanged = train("unchanged", LanguageModel.load(options.model), text, run, options)
    except (ValueError, TypeError, FileNotFoundError) as error:
        sys.exit(f"error: {error}")
    for difference in differences:
        difference.hook.remove()  # a model with hooks is not saved
    found = Found(run["steps"], curve, swapped, unchanged, decode([original, model]))
    print(report(found, [difference.layer for difference in differences]))
    options.out.mkdir(parents=True, exist_ok=True)
    model.save(options.out)
    plot(found, options.out / "swap.png")
    print(f"The model and swap.png are in {options.out}.")


if __name__ == "__main__":
    main()
