"""Train on 512 bytes at a time, then read 8192: a gate loop's memory has one size, full attention's grows.

    python examples/gate_loop_long_context.py                       # gate loop beside full attention, some minutes
    python examples/gate_loop_long_context.py --steps 50 --dim 64   # quicker

Prints bits per byte of unseen text by position, and what decoding holds and takes as the context grows.
Needs: pip install attention-zoo[examples]; with attention-zoo[fast] the recurrence runs at memory speed.
"""

from __future__ import annotations

import argparse
import math
import time
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.utils import clip_grad_norm_
from tqdm import tqdm

from attention_zoo import LanguageModel, gate_loop_lm, training

CHUNK = 512  # bytes read in one step of decoding a prompt


def parse_options() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--dim", type=int, default=128, help="features (%(default)s)")
    add("--depth", type=int, default=3, help="layers (%(default)s)")
    add("--train-len", type=int, default=512, help="bytes seen at once in training (%(default)s)")
    add("--long-len", type=int, default=8192, help="bytes read in evaluation (%(default)s)")
    add("--batch", type=int, default=4, help="pieces of text in a step (%(default)s)")
    add("--steps", type=int, default=900, help="steps of training (%(default)s)")
    add("--lr", type=float, default=2e-3, help="learning rate (%(default)s)")
    add("--data", help="a text file, or a folder of them (the sources of Python's standard library)")
    return parser.parse_args()


def learn(model: LanguageModel, text: Tensor, options: argparse.Namespace, name: str) -> None:
    """Train on random pieces of text."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=options.lr)
    generator = torch.Generator().manual_seed(0)
    for _ in (bar := tqdm(range(options.steps), desc=name)):
        loss = model.loss(training.random_batch(text, options.batch, options.train_len + 1, generator=generator))
        optimizer.zero_grad()
        loss.backward()
        clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        bar.set_postfix_str(f"{loss.item() / math.log(2):.2f} bits/byte")


@torch.no_grad()
def read(model: LanguageModel, tokens: Tensor) -> tuple[Tensor, list[tuple[int, int, float]]]:
    """Read a text in steps. Returns bits per byte of every position, and (bytes read, state bytes, ms per byte)."""
    bits, held, state, start = [], [], None, 0
    while start + 1 < tokens.shape[1]:
        piece = tokens[:, start : min(start + CHUNK, tokens.shape[1] - 1)]
        logits, state = model.step(piece, state)
        wanted = tokens[:, start + 1 : start + 1 + piece.shape[1]]
        bits.append(F.cross_entropy(logits.transpose(1, 2), wanted, reduction="none").mean(0) / math.log(2))
        start += piece.shape[1]
        begin = time.perf_counter()
        for _ in range(5):  # one more byte, five times from the same state
            model.step(tokens[:, start : start + 1], state)
        held.append((start, state.nbytes, (time.perf_counter() - begin) / 5 * 1000))
    return torch.cat(bits), held


def main() -> None:
    """Train both models, read a long text with both, print the tables."""
    options = parse_options()
    text = training.read_text(options.data)
    seen, unseen = training.as_tokens(text.training), training.as_tokens(text.validation)
    sizes = {"num_tokens": 256, "dim": options.dim, "depth": options.depth}
    pieces = training.windows(unseen, options.long_len + 1, at_most=4)
    found = {}
    heads = {"dim_head": max(4, options.dim // 8)}
    for name, make, own in (("gate loop", gate_loop_lm, {}), ("full attention", LanguageModel, heads)):
        torch.manual_seed(0)
        model = make(**sizes, **own)
        learn(model, seen, options, name)
        found[name] = read(model.eval(), pieces)
    frequencies, zipped = training.unigram_entropy(text.validation), training.gzip_bits_per_byte(text.validation)
    print(f"\nbits per byte of unseen text: byte frequencies {frequencies:.3f}, gzip {zipped:.3f}")
    print("bits per byte by position" + "".join(f"{name:>18}" for name in found))
    edge = min(options.train_len, options.long_len)
    edges = [0, edge]
    while edges[-1] < options.long_len:
        edges.append(min(2 * edges[-1], options.long_len))
    for start, stop in pairwise(edges):
        means = [float(bits[start:stop].mean()) for bits, _ in found.values()]
        print(f"{start:>11} ... {stop:<9}" + "".join(f"{mean:>18.3f}" for mean in means))
    print(f"\none more byte of {len(pieces)} texts: size of the state, time")
    print("decoding after n bytes   " + "".join(f"{name:>26}" for name in found))
    rows = list(zip(*(held for _, held in found.values()), strict=True))
    for row in [rows[0], rows[len(rows) // 2], rows[-1]]:
        print(f"{row[0][0]:>25}" + "".join(f"{size / 1024:>10,.0f} KiB {ms:>6.1f} ms" for _, size, ms in row))


if __name__ == "__main__":
    main()
