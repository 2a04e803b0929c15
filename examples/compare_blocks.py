"""The arena: one small model after the other, equal but for its blocks, on real text and on three tasks.

All have the same number of parameters, to one percent (the feedforwards give and take), read the same tokens in the
same order, and are trained alike. The tasks are those where papers claim that blocks differ: associative recall (look
up the value of a key), selective copying (find the tokens among noise), and recall across segments (through a memory).

    python examples/compare_blocks.py --quick     # one seed and few steps: about five minutes on two cores
    python examples/compare_blocks.py             # three seeds: more than an hour
    python examples/compare_blocks.py --blocks full,gate_loop --tasks text

Every trained model leaves one file in the folder `cells`, so an interrupted run goes on when it is called again, and
processes with other --blocks may share the folder. Blocks that know images have an example of their own.

Needs: pip install attention-zoo[examples]
"""

from __future__ import annotations

import argparse
import inspect
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import mean, median, stdev
from time import perf_counter
from typing import Any, NamedTuple

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import clip_grad_norm_
from tqdm import tqdm

from attention_zoo import BLOCKS, LanguageModel, MemoryLanguageModel, training
from attention_zoo.cli._bench.measure import peak_bytes

CPU = torch.device("cpu")
Results = dict[str, dict[str, list[dict[str, Any]]]]  # the cells of an entrant and a task, one per seed
IGNORED = -100  # a target that cross entropy leaves out


# What competes: blocks, cycled over the layers. Positions are rotary where a block takes them; a recurrence needs none.
Entrant = tuple[str, ...]
ENTRANTS: dict[str, Entrant] = {
    "full": ("full",),
    "cosine_sim": ("cosine_sim",),
    "talking_heads": ("talking_heads",),
    "relative_gate": ("relative_gate",),
    "gate_loop": ("gate_loop",),
    "simple_gate_loop": ("simple_gate_loop",),
    "gate_loop + full": ("gate_loop", "full"),
    "simple_gate_loop + full": ("simple_gate_loop", "full"),
}


class Size(NamedTuple):
    """A model's size and how it is trained."""

    dim: int
    depth: int
    batch: int
    steps: int
    lr: float


SLOW = ("relative_gate",)  # takes six times as long, and competes only when it is named

FULL = {
    "text": Size(dim=128, depth=4, batch=8, steps=600, lr=3e-3),
    "associative recall": Size(dim=64, depth=2, batch=64, steps=2000, lr=3e-3),
    "selective copying": Size(dim=64, depth=2, batch=64, steps=1000, lr=3e-3),
    "recall across segments": Size(dim=64, depth=2, batch=32, steps=600, lr=2e-3),
}
QUICK = {
    "text": Size(dim=96, depth=2, batch=8, steps=120, lr=3e-3),
    "associative recall": Size(dim=64, depth=2, batch=32, steps=250, lr=3e-3),
    "selective copying": Size(dim=64, depth=2, batch=32, steps=250, lr=3e-3),
    "recall across segments": Size(dim=64, depth=2, batch=32, steps=250, lr=2e-3),
}
HEADS = 4
SEQ_LEN = 256  # bytes of text seen at once


# The tasks: each draws (b, n) inputs and targets, IGNORED where nothing is asked.

PAIRS, KEYS, VALUES = 8, 16, 16
COPIED, NOISY, SYMBOLS = 8, 40, 16  # tokens to copy, tokens that they hide among, what they may be
SEGMENT, DISTANCE = 8, 4  # tokens of a segment, segments between pair and question


def associative_recall(batch: int) -> tuple[Tensor, Tensor]:
    """Pairs of a key and a value, then the same keys in another order: each asks for its value."""
    keys = torch.rand(batch, KEYS).argsort(dim=1)[:, :PAIRS]
    values = KEYS + torch.randint(VALUES, (batch, PAIRS))
    order = torch.rand(batch, PAIRS).argsort(dim=1)
    asked, answers = keys.gather(1, order), values.gather(1, order)
    pairs = torch.stack((torch.cat((keys, asked), 1), torch.cat((values, answers), 1)), dim=-1)
    targets = torch.full((batch, 4 * PAIRS), IGNORED)
    targets[:, 2 * PAIRS :: 2] = answers
    return pairs.flatten(1), targets


def selective_copying(batch: int) -> tuple[Tensor, Tensor]:
    """A few symbols somewhere in noise (token 0), then as many slots (the last token) for them, in their order."""
    symbols = 1 + torch.randint(SYMBOLS, (batch, COPIED))
    places = torch.rand(batch, NOISY).argsort(dim=1)[:, :COPIED].sort(dim=1).values
    noise = torch.zeros(batch, NOISY, dtype=torch.long).scatter(1, places, symbols)
    inputs = torch.cat((noise, torch.full((batch, COPIED), SYMBOLS + 1)), dim=1)
    targets = torch.full_like(inputs, IGNORED)
    targets[:, NOISY:] = symbols
    return inputs, targets


def recall_across_segments(batch: int, distance: int) -> tuple[Tensor, Tensor]:
    """Two pairs in the first segment of noise, one of their keys at the end of the last: (k + 1) SEGMENT tokens."""
    keys = torch.rand(batch, 8).argsort(dim=1)[:, :2]
    values = 8 + torch.randint(16, (batch, 2))
    inputs = 24 + torch.randint(8, (batch, (distance + 1) * SEGMENT))
    inputs[:, :4] = torch.stack((keys, values), dim=-1).flatten(1)
    inputs[:, -1] = keys[:, 0]
    targets = torch.full_like(inputs, IGNORED)
    targets[:, -1] = values[:, 0]
    return inputs, targets


TASKS = {
    "associative recall": (associative_recall, KEYS + VALUES),
    "selective copying": (selective_copying, SYMBOLS + 2),
}


def build(entrant: Entrant, size: Size, num_tokens: int, *, memory: bool = False) -> nn.Module:
    """The entrant's model, its feedforwards so wide that it has as many parameters as one of full attention."""

    def make(blocks: Entrant, ff_mult: float) -> nn.Module:
        takes = {name: inspect.signature(BLOCKS[name]).parameters for name in blocks}
        heads = {"heads": HEADS, "dim_head": size.dim // HEADS}  # not for recurrences, which have a head per channel
        attention = [(name, heads) if "dim_head" in takes[name] else name for name in blocks]
        common = {"num_tokens": num_tokens, "dim": size.dim, "depth": size.depth, "ff_mult": ff_mult}
        if memory:
            slots = {"memory_slots": 8, "memory_heads": HEADS, "segment_len": SEGMENT}
            return MemoryLanguageModel(attention=attention, **common, **slots)
        return LanguageModel(attention=attention, max_seq_len=SEQ_LEN, **common)

    def count(blocks: Entrant, ff_mult: float) -> int:
        with torch.device("meta"):
            return sum(weight.numel() for weight in make(blocks, ff_mult).parameters())

    want, narrow = count(("full",), 4), count(entrant, 1)
    ff_mult = 1 + (want - narrow) / (count(entrant, 2) - narrow)
    got = count(entrant, ff_mult)
    if abs(got - want) > 0.01 * want:
        raise ValueError(f"parameters must be equal to 1 %, got {got:,} and {want:,} for {entrant}")
    return make(entrant, ff_mult)


def train(model: nn.Module, size: Size, backward: Callable[[], float], name: str) -> list[float]:
    """Take size.steps steps; `backward` leaves gradients and returns the loss. Returns all losses."""
    groups = [
        {"params": [weight for weight in model.parameters() if weight.ndim > 1], "weight_decay": 0.1},
        {"params": [weight for weight in model.parameters() if weight.ndim <= 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=size.lr, betas=(0.9, 0.95))
    warmup = max(1, size.steps // 20)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warmup, 0.05 + 0.475 * (1 + math.cos(math.pi * step / size.steps)))
    )
    losses = []
    bar = tqdm(range(size.steps), desc=name, unit="step", dynamic_ncols=True, leave=False)
    for _ in bar:
        optimizer.zero_grad()
        losses.append(backward())
        clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        bar.set_postfix_str(f"loss {losses[-1]:.3f}", refresh=False)
    return losses


def read_text(entrant: Entrant, size: Size, text: training.Text, seed: int, name: str) -> dict[str, Any]:
    """Train on text. The score is bits per byte of unseen text."""
    seen, unseen = training.as_tokens(text.training), training.as_tokens(text.validation)
    generator = torch.Generator().manual_seed(seed)
    model = build(entrant, size, 256)

    def backward() -> float:
        loss = model.loss(training.random_batch(seen, size.batch, SEQ_LEN + 1, generator=generator))
        loss.backward()
        return loss.item() / math.log(2)

    curve = train(model, size, backward, name)
    model.eval()
    pieces = training.windows(unseen, SEQ_LEN + 1, at_most=128).split(size.batch)
    with torch.no_grad():
        score = mean(model.loss(tokens).item() / math.log(2) for tokens in pieces)
    return {"score": score, "curve": curve, "parameters": sum(weight.numel() for weight in model.parameters())}


def solve(entrant: Entrant, size: Size, task: str, name: str) -> dict[str, Any]:
    """Train on a task. The score is the share of right answers to new questions."""
    draw, num_tokens = TASKS[task]
    model = build(entrant, size, num_tokens)

    def backward() -> float:
        inputs, targets = draw(size.batch)
        loss = F.cross_entropy(model(inputs).flatten(0, 1), targets.flatten(), ignore_index=IGNORED)
        loss.backward()
        return loss.item()

    curve = train(model, size, backward, name)
    model.eval()
    inputs, targets = draw(512)
    with torch.no_grad():
        right = (model(inputs).argmax(-1) == targets)[targets != IGNORED]
    return {"score": float(right.float().mean()), "curve": curve}


def remember(entrant: Entrant, size: Size, name: str) -> dict[str, Any]:
    """Train a model with a memory by memory replay. The score is the share of right answers DISTANCE segments later."""
    model = build(entrant, size, 32, memory=True)

    def answer(output: Any, targets: Tensor) -> Tensor:
        return F.cross_entropy(output.logits[:, -1], targets)

    step = 0

    def backward() -> float:
        nonlocal step
        step += 1  # near questions come first: what the memory holds is learned before how long it holds it
        longest = min(DISTANCE, 3 * (DISTANCE + 1) * step // (2 * size.steps))
        inputs, targets = recall_across_segments(size.batch, longest)
        segments = inputs.split(SEGMENT, dim=1)
        asked = [None] * longest + [targets[:, -1]]
        return float(training.memory_replay(model, segments, asked, loss=answer).loss)

    curve = train(model, size, backward, name)
    model.eval()
    inputs, targets = recall_across_segments(512, DISTANCE)
    memory = None
    with torch.no_grad():
        for segment in inputs.split(SEGMENT, dim=1):
            logits, memory = model(segment, memory=memory)
    return {"score": float((logits[:, -1].argmax(-1) == targets[:, -1]).float().mean()), "curve": curve}


def measure(names: Sequence[str], size: Size, rounds: int = 7) -> dict[str, tuple[float, float]]:
    """Tokens per second and peak MiB of a training step on text; the models take turns, so that all have one day."""
    tokens = torch.randint(256, (size.batch, SEQ_LEN + 1))
    models = {name: build(ENTRANTS[name], size, 256) for name in names}
    times: dict[str, list[float]] = {name: [] for name in names}
    for _ in range(rounds + 1):
        for name, model in models.items():
            begin = perf_counter()
            model.loss(tokens).backward()
            times[name].append(perf_counter() - begin)
    found = {}
    for name, model in models.items():
        peak = peak_bytes(lambda model=model: model.loss(tokens).backward(), CPU)
        found[name] = size.batch * SEQ_LEN / median(times[name][1:]), peak / 2**20
    return found


def spread(scores: Sequence[float], percent: bool) -> str:
    """Mean, and standard deviation over the seeds."""
    factor, digits = (100, 1) if percent else (1, 3)
    text = f"{factor * mean(scores):.{digits}f}"
    return text if len(scores) < 2 else f"{text} ± {factor * stdev(scores):.{digits}f}"


def table(results: Results, speed: dict[str, tuple[float, float]]) -> str:
    """The results as Markdown, the best on text first."""
    tasks = list(next(iter(results.values())))
    heads = {"text": "bits per byte"}
    lines = [
        "| blocks | " + " | ".join(heads.get(task, f"{task}, %") for task in tasks) + " | tokens/s | peak MiB |",
        "|---|" + "---|" * (len(tasks) + 2),
    ]
    first = tasks[0]
    best = 1 if first == "text" else -1
    for name in sorted(results, key=lambda name: best * mean(cell["score"] for cell in results[name][first])):
        cells = [spread([cell["score"] for cell in results[name][task]], task != "text") for task in tasks]
        lines.append(f"| {name} | " + " | ".join(cells) + f" | {speed[name][0]:,.0f} | {speed[name][1]:.0f} |")
    return "\n".join(lines)


def plot(results: Results, sizes: dict[str, Size], path: Path) -> None:
    """Draw the loss on text against tokens read, and the answers to the tasks."""
    tasks = [task for task in next(iter(results.values())) if task != "text"]
    figure = Figure(figsize=(13, 5.5), layout="constrained")
    left, right = figure.subplots(1, 2)
    for k, (name, found) in enumerate(results.items()):
        color = f"C{k}"
        if "text" in found:
            curves = torch.tensor([cell["curve"] for cell in found["text"]])
            width = max(1, curves.shape[1] // 30)
            bits = curves.unfold(1, width, width).mean(-1)
            tokens = torch.arange(1, bits.shape[1] + 1) * width * sizes["text"].batch * SEQ_LEN / 1e6
            left.plot(tokens, bits.mean(0), color=color, label=name)
            left.fill_between(tokens, bits.amin(0), bits.amax(0), color=color, alpha=0.15, linewidth=0)
        scores = [[100 * cell["score"] for cell in found[task]] for task in tasks]
        places = [place + (k - len(results) / 2 + 0.5) * 0.8 / len(results) for place in range(len(tasks))]
        errors = [stdev(some) if len(some) > 1 else 0.0 for some in scores]
        right.bar(places, [mean(some) for some in scores], 0.8 / len(results), yerr=errors, color=color, label=name)
    left.set(xlabel="millions of bytes read", ylabel="bits per byte, training", yscale="log", title="text")
    left.yaxis.set_major_formatter("{x:.1f}")
    left.yaxis.set_minor_formatter("{x:.1f}")
    right.set(ylabel="right answers in %", ylim=(0, 103), title="tasks: mean and standard deviation over seeds")
    right.set_xticks(range(len(tasks)), tasks)
    left.legend(fontsize=8)
    figure.savefig(path, dpi=120)


def run(options: argparse.Namespace, sizes: dict[str, Size]) -> Results:
    """Train every cell that has no file yet. Returns all, by entrant and task."""
    text = training.read_text(options.data)
    folder = options.out / "cells"
    folder.mkdir(parents=True, exist_ok=True)
    results: Results = {name: {task: [] for task in sizes} for name in options.blocks}
    cells = [(seed, task, name) for seed in range(options.seeds) for task in sizes for name in options.blocks]
    for seed, task, name in tqdm(cells, desc="all", unit="model", dynamic_ncols=True):
        path = folder / f"{name} - {task} - {seed}.json".replace(" ", "_")
        label, size, entrant = f"{name}, {task}, seed {seed}", sizes[task], ENTRANTS[name]
        told = {"blocks": list(entrant), "size": size._asdict(), "source": text.source if task == "text" else None}
        cell = json.loads(path.read_text()) if path.exists() else None
        if cell is None or cell["told"] != told:
            torch.manual_seed(seed)
            if task == "text":
                cell = read_text(entrant, size, text, seed, label)
            elif task == "recall across segments":
                cell = remember(entrant, size, label)
            else:
                cell = solve(entrant, size, task, label)
            beside = path.with_suffix(".new")  # a file is there whole or not at all
            beside.write_text(json.dumps({**cell, "told": told}))
            beside.replace(path)
            tqdm.write(f"{label}: {cell['score']:.3f}")
        results[name][task].append(cell)
    return results


def parse_options() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--quick", action="store_true", help="smaller models, fewer steps, one seed")
    add("--blocks", default=",".join(name for name in ENTRANTS if name not in SLOW), help="who competes (%(default)s)")
    add("--tasks", default=",".join(FULL), help="at what, of: %(default)s")
    add("--seeds", type=int, help="runs of each, seeds 0, 1, ... (3, quick 1)")
    add("--steps", type=int, help="steps of training, in place of each task's own number")
    add("--data", help="a text file, or a folder of them (the sources of Python's standard library)")
    add("--out", type=Path, help="folder of the results (runs/compare_blocks, or runs/compare_blocks_quick)")
    options = parser.parse_args()
    for name, known in (("blocks", ENTRANTS), ("tasks", FULL)):
        chosen = getattr(options, name).split(",")
        unknown = [one for one in chosen if one not in known]
        if unknown:
            parser.error(f"--{name} must be of {', '.join(known)}, got {unknown[0]!r}")
        setattr(options, name, chosen)
    options.seeds = (1 if options.quick else 3) if options.seeds is None else options.seeds
    if options.seeds < 1 or (options.steps is not None and options.steps < 1):
        parser.error(f"--seeds and --steps must be at least 1, got {options.seeds} and {options.steps}")
    options.out = options.out or Path("runs/compare_blocks_quick" if options.quick else "runs/compare_blocks")
    return options


def main() -> None:
    """Train them all, print the table, draw the picture."""
    options = parse_options()
    known = QUICK if options.quick else FULL
    sizes = {task: known[task] for task in options.tasks}
    if options.steps is not None:
        sizes = {task: size._replace(steps=options.steps) for task, size in sizes.items()}
    try:
        results = run(options, sizes)
    except KeyboardInterrupt:
        raise SystemExit("\nStopped. The same command goes on with the models that are missing.") from None
    lines = table(results, measure(options.blocks, known["text"]))
    (options.out / "compare_blocks.md").write_text(lines + "\n")
    plot(results, sizes, options.out / "compare_blocks.png")
    print(f"\n{lines}\n\nThe table and compare_blocks.png are in {options.out}.")


if __name__ == "__main__":
    main()
