"""Recall across segments with Memformer: key/value pairs are shown once, and a value is asked for k segments later.

The model processes one short segment at a time, so that only its memory carries the answer. It is trained by memory
replay, and the distance grows with its accuracy. The baseline is a model whose memory is reset after every segment.

    python examples/recall_across_segments.py                   # about two minutes on two cores
    python examples/recall_across_segments.py --distance 2      # shorter distance
    python examples/recall_across_segments.py --memory-update paper

Needs: pip install attention-zoo[examples]
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import NamedTuple

import torch
from einops import rearrange
from matplotlib.figure import Figure
from torch import Tensor
from torch.nn.utils import clip_grad_norm_

from attention_zoo import Memformer, training

KEYS, VALUES, FILLERS = 8, 16, 8  # sizes of the vocabulary: keys, values, noise, in this order
PAIRS = 2
SEGMENT = 8  # tokens per segment
MASTERED = 0.97  # accuracy from which the distance grows


class Task(NamedTuple):
    """A batch of tasks.

    segments: k + 1 tensors (b, SEGMENT), with the pairs in the first.
    question: (b, 2), a key and its value.
    """

    segments: list[Tensor]
    question: Tensor


def draw(batch: int, distance: int, device: str) -> Task:
    """Random pairs in the first of distance + 1 segments of noise, and a question about one of them."""
    keys = torch.rand(batch, KEYS).argsort(dim=1)[:, :PAIRS]
    values = KEYS + torch.randint(VALUES, (batch, PAIRS))
    segments = [KEYS + VALUES + torch.randint(FILLERS, (batch, SEGMENT)) for _ in range(distance + 1)]
    start = torch.randint(SEGMENT - 2 * PAIRS + 1, (batch, 1))  # position of the pairs
    segments[0].scatter_(1, start + torch.arange(2 * PAIRS), rearrange([keys, values], "kv b p -> b (p kv)"))
    question = torch.stack((keys[:, 0], values[:, 0]), dim=-1)  # the order of the keys is random
    return Task([segment.to(device) for segment in segments], question.to(device))


@torch.no_grad()
def accuracy(model: Memformer, distance: int, *, remember: bool, count: int = 1024) -> float:
    """Fraction of tasks whose value is the most likely prediction."""
    device = str(next(model.parameters()).device)
    task = draw(count, distance, device)
    model.eval()
    memory = None
    for segment in task.segments[:-1]:
        memory = model(segment, memory=memory).memory if remember else None
    logits = model(task.segments[-1], task.question, memory=memory).logits
    model.train()
    return float((logits[:, 0].argmax(-1) == task.question[:, 1]).float().mean())


def train(options: argparse.Namespace, *, remember: bool) -> Memformer:
    """Train a model, with memory on distances that grow by one at an accuracy of MASTERED."""
    torch.manual_seed(options.seed)
    model = Memformer(
        dim=options.dim,
        memory_slots=8,
        memory_update=options.memory_update,
        memory_heads=4,
        enc_num_tokens=KEYS + VALUES + FILLERS,
        enc_depth=1,
        enc_heads=4,
        dec_num_tokens=KEYS + VALUES,
        dec_depth=1,
        dec_heads=4,
    ).to(options.device)
    optimizer = torch.optim.Adam(model.parameters(), lr=options.lr)
    longest, correct = 0 if remember else options.distance, 0.0
    name = "with memory" if remember else "without"
    progress = training.Progress(options.steps, name=name)
    for step in range(1, options.steps + 1):
        for group in optimizer.param_groups:
            group["lr"] = options.lr * min(1.0, step / 100, 10 * (1 - (step - 1) / options.steps))
        distance = longest if step % 2 else int(torch.randint(longest + 1, ()))
        task = draw(options.batch, distance, options.device)
        segments = task.segments if remember else task.segments[-1:]
        optimizer.zero_grad()
        loss = training.memory_replay(model, segments, task.question).loss
        clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if remember and step % 50 == 0:
            correct = accuracy(model, longest, remember=True, count=512)
            if correct >= MASTERED and longest < options.distance:
                longest += 1
        progress.update(f"loss {float(loss):.3f}, k = {longest}" + f", accuracy {correct:.1%}" * remember)
    return model


def plot(found: dict[str, list[float]], path: Path) -> None:
    """Plot accuracy against distance."""
    axes = Figure(figsize=(8, 5), layout="constrained").subplots()
    for (name, scores), marker in zip(found.items(), "os", strict=True):
        axes.plot(range(len(scores)), [100 * score for score in scores], marker=marker, label=name)
    axes.axhline(100 / VALUES, color="gray", linestyle="--", label=f"chance: {100 / VALUES:.1f} %")
    axes.set(xlabel="segments between pair and question", ylabel="accuracy in %", ylim=(0, 103))
    axes.set_xticks(range(len(next(iter(found.values())))))
    axes.set_title(f"Recall across segments of {SEGMENT} tokens")
    axes.legend()
    axes.figure.savefig(path, dpi=120)


def main() -> None:
    """Train both models, print and plot their accuracy."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--distance", type=int, default=4, help="maximum distance in training, in segments (%(default)s)")
    add("--memory-update", default="gru", choices=("gru", "paper"), help="memory update (%(default)s)")
    add("--dim", type=int, default=64, help="number of features (%(default)s)")
    add("--batch", type=int, default=64, help="tasks per training step (%(default)s)")
    add("--lr", type=float, default=2e-3, help="peak learning rate (%(default)s)")
    add("--steps", type=int, default=1500, help="training steps (%(default)s)")
    add("--seed", type=int, default=0, help="random seed (%(default)s)")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="device (%(default)s)")
    add("--out", type=Path, default=Path("runs/recall"), help="output folder (%(default)s)")
    options = training.parse_options(parser)
    model = train(options, remember=True)
    baseline = train(options, remember=False)
    distances = range(2 * options.distance + 1)
    found = {
        "memory": [accuracy(model, k, remember=True) for k in distances],
        "no memory": [accuracy(baseline, k, remember=False) for k in distances],
    }
    print(f"accuracy by distance in segments (trained up to {options.distance}; chance {1 / VALUES:.1%})")
    print("   k   memory   no memory")
    for k in distances:
        print(f"{k:4}   {found['memory'][k]:6.1%}   {found['no memory'][k]:9.1%}")
    options.out.mkdir(parents=True, exist_ok=True)
    model.save(options.out)
    plot(found, options.out / "recall.png")
    print(f"The model and recall.png are in {options.out}.")


if __name__ == "__main__":
    main()
