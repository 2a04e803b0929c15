"""Masked-token training with one and with two feature streams, and a plot of their mixed attention heads.

python examples/multi_stream.py     # about five minutes on two CPU cores
"""

from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch import Tensor

from attention_zoo import MultiStreamTransformer, training

MASK = 256  # id of the mask token, after the 256 bytes
SENTENCE = b"for index, name in enumerate(names): print(index, name)"


def build(streams: int, options: argparse.Namespace) -> MultiStreamTransformer:
    """A bidirectional model. Streams share all weights except an embedding per stream and the head mixes."""
    return MultiStreamTransformer(
        num_tokens=257,
        dim=options.dim,
        depth=options.depth,
        streams=streams,
        heads=options.heads,
        dim_head=options.dim // options.heads,
        max_seq_len=options.seq_len,
        causal=False,
        separate_embeddings=False,
    )


def train(model: MultiStreamTransformer, text: Tensor, options: argparse.Namespace, name: str) -> None:
    """Train to predict masked bytes of random sequences."""
    generator = torch.Generator().manual_seed(options.seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=options.lr, betas=(0.9, 0.95), weight_decay=0.01)
    warmup = max(1, options.steps // 20)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min((step + 1) / warmup, 0.05 + 0.475 * (1 + math.cos(math.pi * step / options.steps))),
    )
    with training.Progress(options.steps, name=name) as progress:
        for _ in range(options.steps):
            tokens = training.random_batch(text, options.batch, options.seq_len, generator=generator)
            loss = training.masked_token_loss(model, tokens, MASK, probability=options.hidden, generator=generator)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            progress.update(f"loss {loss.item():.3f}")


@torch.no_grad()
def evaluate(model: MultiStreamTransformer, text: Tensor, options: argparse.Namespace) -> float:
    """Bits per masked byte of validation text, with 15 % masked, the same bytes for every model."""
    generator = torch.Generator().manual_seed(1)
    model.eval()
    batches = training.windows(text, options.seq_len, at_most=16 * options.batch).split(options.batch)
    losses = [training.masked_token_loss(model, tokens, MASK, generator=generator).item() for tokens in batches]
    return sum(losses) / len(losses) / math.log(2)


def bigram_bits(train_text: Tensor, validation_text: Tensor) -> float:
    """Bits per byte of a bigram model."""
    pairs = train_text[:-1].long() * 256 + train_text[1:].long()
    counts = torch.bincount(pairs, minlength=256**2).view(256, 256) + 0.1
    probabilities = counts / counts.sum(1, keepdim=True)
    return float(-probabilities[validation_text[:-1].long(), validation_text[1:].long()].log2().mean())


@torch.no_grad()
def draw(model: MultiStreamTransformer, options: argparse.Namespace, path: Path) -> None:
    """Plot the attention maps of the middle layer for one line of code, before and after the heads are mixed."""
    tokens = torch.tensor([list(SENTENCE[: options.seq_len])])
    inputs: list[Tensor] = []
    layer = model.stack.layers[options.depth // 2].sublayers[0]
    hook = layer.block.register_forward_pre_hook(lambda block, args: inputs.append(block.unfold(args[0])))
    model(tokens)
    hook.remove()
    block = layer.block.block
    maps = {"after the softmax": block.attention_map(inputs[0], mixed=False)[0]}
    maps["mixed"] = block.attention_map(inputs[0])[0]
    heads = maps["mixed"].shape[0]
    figure = Figure(figsize=(2.1 * heads + 1, 5.4), layout="constrained")
    for (name, rows), axes in zip(maps.items(), figure.subplots(2, heads), strict=True):
        limit = float(rows.abs().quantile(0.995))
        signed = bool((rows < 0).any())  # mixed weights may be negative
        colors = {"cmap": "RdBu" if signed else "viridis", "vmin": -limit if signed else 0, "vmax": limit}
        for head, axis in enumerate(axes):
            shown = axis.imshow(rows[head], **colors)
            axis.set_title(f"stream {head // block.heads}, head {head % block.heads}", fontsize=8)
            axis.set_xlabel("key (byte)", fontsize=7)
            axis.tick_params(labelsize=6)
        axes[0].set_ylabel(f"{name}\nquery (byte)")
        extend = "both" if signed else "max"
        label = "weight (red: negative)" if signed else "weight"
        figure.colorbar(shown, ax=list(axes), label=label, extend=extend)
    title = f"layer {options.depth // 2} after {options.steps} steps: attention of {SENTENCE[:24].decode()!r} ..."
    figure.suptitle(title, fontsize=10)
    figure.savefig(path, dpi=120)


def main() -> None:
    """Train both models, print their scores, save the plot."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--steps", type=int, default=2000, help="training steps of each model (%(default)s)")
    add("--dim", type=int, default=96, help="number of features (%(default)s)")
    add("--depth", type=int, default=3, help="number of layers (%(default)s)")
    add("--heads", type=int, default=4, help="number of heads per stream (%(default)s)")
    add("--seq-len", type=int, default=128, help="bytes per sequence (%(default)s)")
    add("--batch", type=int, default=16, help="sequences per training step (%(default)s)")
    add("--lr", type=float, default=3e-3, help="peak learning rate (%(default)s)")
    add("--hidden", type=float, default=0.3, help="fraction of masked bytes in training (%(default)s)")
    add("--seed", type=int, default=0, help="random seed (%(default)s)")
    add("--data", help="text file, or folder of text files (Python's standard library)")
    add("--out", type=Path, default=Path("runs/multi_stream"), help="output folder (%(default)s)")
    options = training.parse_options(parser)
    if options.dim % options.heads:
        parser.error(f"--heads must divide --dim, got {options.heads} and {options.dim}")
    if not 0 < options.hidden < 1:
        parser.error(f"--hidden must lie between 0 and 1, got {options.hidden}")
    try:
        text = training.read_text(options.data)
        for part in (text.training, text.validation):
            training.windows(training.as_tokens(part), options.seq_len)
    except (FileNotFoundError, ValueError) as error:
        sys.exit(f"error: {error}")
    options.out.mkdir(parents=True, exist_ok=True)
    train_text, validation_text = training.as_tokens(text.training), training.as_tokens(text.validation)
    entropy, bigrams = training.unigram_entropy(text.validation), bigram_bits(train_text, validation_text)
    print(f"bits per byte of validation text: byte frequencies {entropy:.3f}, bigrams {bigrams:.3f}")
    for streams in (1, 2):
        torch.manual_seed(options.seed)
        model = build(streams, options)
        name = f"{streams} stream" + "s" * (streams > 1)
        train(model, train_text, options, name)
        bits = evaluate(model, validation_text, options)
        count = sum(weight.numel() for weight in model.parameters())
        line = f"{name}: {count:,} parameters, {bits:.3f} bits per masked byte of validation text"
        if streams > 1:
            tokens = training.windows(validation_text, options.seq_len, at_most=options.batch)
            with torch.no_grad():
                line += f", diversity loss {model.diversity(tokens).item():.3f} over {options.depth} layers"
        print(line)
    draw(model, options, options.out / "heads.png")
    print(f"The attention maps are in {options.out / 'heads.png'}.")


if __name__ == "__main__":
    main()
