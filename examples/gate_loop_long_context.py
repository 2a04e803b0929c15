"""Length extrapolation: train on 512 bytes and evaluate on 8192, with a gate loop and with full attention.

    python examples/gate_loop_long_context.py                       # a few minutes
    python examples/gate_loop_long_context.py --steps 50 --dim 64   # faster

Prints bits per byte of validation text by position, and the size of the decoding state and the time per byte as the
context grows. The state of the gate loop has a constant size, the key/value cache of full attention grows.

Needs: pip install attention-zoo[examples]; with attention-zoo[fast] the recurrence runs at memory speed.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.utils import clip_grad_norm_

from attention_zoo import LanguageModel, gate_loop_lm, training

CHUNK = 512  # bytes per decoding step


def parse_options() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--dim", type=int, default=128, help="number of features (%(default)s)")
    add("--depth", type=int, default=3, help="number of layers (%(default)s)")
    add("--train-len", type=int, default=512, help="bytes per training sequence (%(default)s)")
    add("--long-len", type=int, default=8192, help="bytes per evaluation sequence (%(default)s)")
    add("--batch", type=int, default=4, help="sequences per training step (%(default)s)")
    add("--steps", type=int, default=900, help="training steps (%(default)s)")
    add("--lr", type=float, default=2e-3, help="learning rate (%(default)s)")
    add("--data", help="text file, or folder of text files (Python's standard library)")
    return training.parse_options(parser)


def train(model: LanguageModel, text: Tensor, options: argparse.Namespace, name: str) -> None:
    """Train on random sequences of text."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=options.lr)
    generator = torch.Generator().manual_seed(0)
    with training.Progress(options.steps, name=name) as progress:
        for _ in range(options.steps):
            loss = model.loss(training.random_batch(text, options.batch, options.train_len + 1, generator=generator))
            optimizer.zero_grad()
            loss.backward()
            clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            progress.update(f"{loss.item() / math.log(2):.2f} bits/byte")


@torch.no_grad()
def evaluate(model: LanguageModel, tokens: Tensor) -> tuple[Tensor, list[tuple[int, int, float]]]:
    """Decode in steps of CHUNK. Returns bits per byte of every position, and (position, state bytes, ms per byte)."""
    bits, costs, state, start = [], [], None, 0
    while start + 1 < tokens.shape[1]:
        piece = tokens[:, start : min(start + CHUNK, tokens.shape[1] - 1)]
        logits, state = model.step(piece, state)
        targets = tokens[:, start + 1 : start + 1 + piece.shape[1]]
        bits.append(F.cross_entropy(logits.transpose(1, 2), targets, reduction="none").mean(0) / math.log(2))
        start += piece.shape[1]
        begin = time.perf_counter()
        for _ in range(5):  # one more byte, five times from the same state
            model.step(tokens[:, start : start + 1], state)
        costs.append((start, state.nbytes, (time.perf_counter() - begin) / 5 * 1000))
    return torch.cat(bits), costs


def main() -> None:
    """Train and evaluate both models, and print the tables."""
    options = parse_options()
    sizes = {"num_tokens": 256, "dim": options.dim, "depth": options.depth}
    try:
        text = training.read_text(options.data)
        long_texts = training.windows(training.as_tokens(text.validation), options.long_len + 1, at_most=4)
    except (FileNotFoundError, ValueError) as error:
        sys.exit(f"error: {error}")
    found = {}
    heads = {"dim_head": max(4, options.dim // 8)}
    for name, make, own in (("gate loop", gate_loop_lm, {}), ("full attention", LanguageModel, heads)):
        torch.manual_seed(0)
        model = make(**sizes, **own)
        train(model, training.as_tokens(text.training), options, name)
        found[name] = evaluate(model.eval(), long_texts)
    frequencies, zipped = training.unigram_entropy(text.validation), training.gzip_bits_per_byte(text.validation)
    print(f"\nbits per byte of validation text: byte frequencies {frequencies:.3f}, gzip {zipped:.3f}")
    print("bits per byte by position" + "".join(f"{name:>18}" for name in found))
    edge = min(options.train_len, options.long_len)
    edges = [0, edge]
    while edges[-1] < options.long_len:
        edges.append(min(2 * edges[-1], options.long_len))
    for start, stop in pairwise(edges):
        means = [float(bits[start:stop].mean()) for bits, _ in found.values()]
        print(f"{start:>11} ... {stop:<9}" + "".join(f"{mean:>18.3f}" for mean in means))
    print(f"\nnext byte of {len(long_texts)} texts: size of the state, time")
    print("decoding after n bytes   " + "".join(f"{name:>26}" for name in found))
    rows = list(zip(*(costs for _, costs in found.values()), strict=True))
    for row in [rows[0], rows[len(rows) // 2], rows[-1]]:
        print(f"{row[0][0]:>25}" + "".join(f"{size / 1024:>10,.0f} KiB {ms:>6.1f} ms" for _, size, ms in row))


if __name__ == "__main__":
    main()
