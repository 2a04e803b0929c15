"""Compare attention layers: small models that differ only in their attention, on text and on three synthetic tasks.

All models have the same number of parameters within 1 % (by the width of the feedforwards), the same training data in
the same order, and the same hyperparameters. The tasks are ones where the literature reports differences: associative
recall (look up the value of a key), selective copying (find tokens in noise), and recall across segments (through a
memory).

    python examples/compare_blocks.py --quick     # one seed, few steps: about five minutes on two cores
    python examples/compare_blocks.py             # three seeds: more than an hour
    python examples/compare_blocks.py --blocks full,gate_loop --tasks text

Each trained model writes one file to the folder `cells`. An interrupted run continues with the missing models when
started again, and several processes with different --blocks may share the folder. Image layers have their own example.

Needs: pip install attention-zoo[examples]
"""

from __future__ import annotations

import argparse
import inspect
import json
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import mean, median, stdev
from time import perf_counter
from typing import Any, NamedTuple

import torch
from einops import rearrange
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import clip_grad_norm_

from attention_zoo import BLOCKS, LanguageModel, MemoryLanguageModel, training
from attention_zoo.cli._bench.measure import peak_bytes

CPU = torch.device("cpu")
Results = dict[str, dict[str, list[dict[str, Any]]]]  # results of a model and a task, one per seed
IGNORED = -100  # target ignored by the cross entropy


# The models: attention layers, cycled over the depth. Positions are rotary where a layer supports them.
Layers = tuple[str | tuple[str, dict[str, Any]], ...]
MODELS: dict[str, Layers] = {
    "full": ("full",),
    "full with qk norm": (("full", {"qk_norm": "rms"}),),
    "window + full": (("window", {"window": 32}), "full"),
    "cosine_sim": ("cosine_sim",),
    "talking_heads": ("talking_heads",),
    "relative_gate": ("relative_gate",),
    "gate_loop": ("gate_loop",),
    "simple_gate_loop": ("simple_gate_loop",),
    "gate_loop + full": ("gate_loop", "full"),
    "simple_gate_loop + full": ("simple_gate_loop", "full"),
}


class Size(NamedTuple):
    """Model size and training hyperparameters."""

    dim: int
    depth: int
    batch: int
    steps: int
    lr: float


SLOW = ("relative_gate",)  # six times slower, included only if named in --blocks

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
SEQ_LEN = 256  # bytes per text sequence


# The tasks: each returns random inputs and targets, both (b, n); targets without a question are IGNORED.

PAIRS, KEYS, VALUES = 8, 16, 16
COPIED, NOISY, SYMBOLS = 8, 40, 16  # tokens to copy, length of the noise with them, size of their vocabulary
SEGMENT, DISTANCE = 8, 4  # tokens per segment, segments between pair and question


def associative_recall(batch: int) -> tuple[Tensor, Tensor]:
    """Key/value pairs, then the same keys in another order; the targets are their values."""
    keys = torch.rand(batch, KEYS).argsort(dim=1)[:, :PAIRS]
    values = KEYS + torch.randint(VALUES, (batch, PAIRS))
    order = torch.rand(batch, PAIRS).argsort(dim=1)
    asked, answers = keys.gather(1, order), values.gather(1, order)
    pairs = rearrange([torch.cat((keys, asked), 1), torch.cat((values, answers), 1)], "kv b p -> b (p kv)")
    targets = torch.full((batch, 4 * PAIRS), IGNORED)
    targets[:, 2 * PAIRS :: 2] = answers
    return pairs, targets


def selective_copying(batch: int) -> tuple[Tensor, Tensor]:
    """Symbols at random positions in noise (token 0), then one slot (the last token) per symbol; the targets are the
    symbols in order."""
    symbols = 1 + torch.randint(SYMBOLS, (batch, COPIED))
    positions = torch.rand(batch, NOISY).argsort(dim=1)[:, :COPIED].sort(dim=1).values
    noise = torch.zeros(batch, NOISY, dtype=torch.long).scatter(1, positions, symbols)
    inputs = torch.cat((noise, torch.full((batch, COPIED), SYMBOLS + 1)), dim=1)
    targets = torch.full_like(inputs, IGNORED)
    targets[:, NOISY:] = symbols
    return inputs, targets


def recall_across_segments(batch: int, distance: int) -> tuple[Tensor, Tensor]:
    """Two key/value pairs in the first of distance + 1 segments of noise, one of the keys at the end of the last."""
    keys = torch.rand(batch, 8).argsort(dim=1)[:, :2]
    values = 8 + torch.randint(16, (batch, 2))
    inputs = 24 + torch.randint(8, (batch, (distance + 1) * SEGMENT))
    inputs[:, :4] = rearrange([keys, values], "kv b p -> b (p kv)")
    inputs[:, -1] = keys[:, 0]
    targets = torch.full_like(inputs, IGNORED)
    targets[:, -1] = values[:, 0]
    return inputs, targets


TASKS = {
    "associative recall": (associative_recall, KEYS + VALUES),
    "selective copying": (selective_copying, SYMBOLS + 2),
}


def build(layers: Layers, size: Size, num_tokens: int, *, memory: bool = False) -> nn.Module:
    """A model whose feedforward width gives it as many parameters as the model with full attention."""

    def make(layers: Layers, ff_mult: float) -> nn.Module:
        heads = {"heads": HEADS, "dim_head": size.dim // HEADS}  # not for recurrences, which have a head per channel
        specs = [(layer, {}) if isinstance(layer, str) else layer for layer in layers]
        sized = {name for name, _ in specs if "dim_head" in inspect.signature(BLOCKS[name]).parameters}
        attention = [(name, options | (heads if name in sized else {})) for name, options in specs]
        common = {"num_tokens": num_tokens, "dim": size.dim, "depth": size.depth, "ff_mult": ff_mult}
        if memory:
            slots = {"memory_slots": 8, "memory_heads": HEADS, "segment_len": SEGMENT}
            return MemoryLanguageModel(attention=attention, **common, **slots)
        return LanguageModel(attention=attention, max_seq_len=SEQ_LEN, **common)

    def count(layers: Layers, ff_mult: float) -> int:
        with torch.device("meta"):
            return sum(weight.numel() for weight in make(layers, ff_mult).parameters())

    want, narrow = count(("full",), 4), count(layers, 1)
    ff_mult = 1 + (want - narrow) / (count(layers, 2) - narrow)
    got = count(layers, ff_mult)
    if abs(got - want) > 0.01 * want:
        raise ValueError(f"parameter counts must agree within 1 %, got {got:,} and {want:,} for {layers}")
    return make(layers, ff_mult)


def train(model: nn.Module, size: Size, backward: Callable[[], float], name: str) -> list[float]:
    """Train for size.steps steps. `backward` computes gradients and returns the loss. Returns all losses."""
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
    with training.Progress(size.steps, name=name) as progress:
        for _ in range(size.steps):
            optimizer.zero_grad()
            losses.append(backward())
            clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            progress.update(f"loss {losses[-1]:.3f}")
    return losses


def learn_text(layers: Layers, size: Size, text: training.Text, seed: int, name: str) -> dict[str, Any]:
    """Train on text. The score is bits per byte of validation text."""
    train_text, validation_text = training.as_tokens(text.training), training.as_tokens(text.validation)
    generator = torch.Generator().manual_seed(seed)
    model = build(layers, size, 256)

    def backward() -> float:
        loss = model.loss(training.random_batch(train_text, size.batch, SEQ_LEN + 1, generator=generator))
        loss.backward()
        return loss.item() / math.log(2)

    curve = train(model, size, backward, name)
    model.eval()
    batches = training.windows(validation_text, SEQ_LEN + 1, at_most=128).split(size.batch)
    with torch.no_grad():
        score = mean(model.loss(tokens).item() / math.log(2) for tokens in batches)
    return {"score": score, "curve": curve, "parameters": sum(weight.numel() for weight in model.parameters())}


def solve(layers: Layers, size: Size, task: str, name: str) -> dict[str, Any]:
    """Train on a task. The score is the accuracy on new samples."""
    draw, num_tokens = TASKS[task]
    model = build(layers, size, num_tokens)

    def backward() -> float:
        inputs, targets = draw(size.batch)
        loss = F.cross_entropy(rearrange(model(inputs), "b n v -> (b n) v"), targets.flatten(), ignore_index=IGNORED)
        loss.backward()
        return loss.item()

    curve = train(model, size, backward, name)
    model.eval()
    inputs, targets = draw(512)
    with torch.no_grad():
        correct = (model(inputs).argmax(-1) == targets)[targets != IGNORED]
    return {"score": float(correct.float().mean()), "curve": curve}


def recall(layers: Layers, size: Size, name: str) -> dict[str, Any]:
    """Train a model with memory by memory replay. The score is the accuracy DISTANCE segments later."""
    model = build(layers, size, 32, memory=True)

    def answer_loss(output: Any, targets: Tensor) -> Tensor:
        return F.cross_entropy(output.logits[:, -1], targets)

    step = 0

    def backward() -> float:
        nonlocal step
        step += 1  # curriculum: the distance grows during training
        longest = min(DISTANCE, 3 * (DISTANCE + 1) * step // (2 * size.steps))
        inputs, targets = recall_across_segments(size.batch, longest)
        segments = inputs.split(SEGMENT, dim=1)
        answers = [None] * longest + [targets[:, -1]]
        return float(training.memory_replay(model, segments, answers, loss=answer_loss).loss)

    curve = train(model, size, backward, name)
    model.eval()
    inputs, targets = recall_across_segments(512, DISTANCE)
    memory = None
    with torch.no_grad():
        for segment in inputs.split(SEGMENT, dim=1):
            logits, memory = model(segment, memory=memory)
    return {"score": float((logits[:, -1].argmax(-1) == targets[:, -1]).float().mean()), "curve": curve}


def measure(names: Sequence[str], size: Size, rounds: int = 7) -> dict[str, tuple[float, float]]:
    """Tokens per second and peak MiB of a training step on text, with the models timed in turn."""
    tokens = torch.randint(256, (size.batch, SEQ_LEN + 1))
    models = {name: build(MODELS[name], size, 256) for name in names}
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
    """Mean and standard deviation over the seeds."""
    factor, digits = (100, 1) if percent else (1, 3)
    text = f"{factor * mean(scores):.{digits}f}"
    return text if len(scores) < 2 else f"{text} ± {factor * stdev(scores):.{digits}f}"


def table(results: Results, speed: dict[str, tuple[float, float]]) -> str:
    """A Markdown table, best model on the first task first."""
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
    """Plot the training loss on text, and the accuracy on the tasks."""
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
        positions = [task + (k - len(results) / 2 + 0.5) * 0.8 / len(results) for task in range(len(tasks))]
        errors = [stdev(values) if len(values) > 1 else 0.0 for values in scores]
        means = [mean(values) for values in scores]
        upper = [min(error, 100 - value) for value, error in zip(means, errors, strict=True)]  # no accuracy above 100 %
        right.bar(positions, means, 0.8 / len(results), yerr=(errors, upper), color=color, label=name)
    left.set(xlabel="millions of training bytes", ylabel="bits per byte, training", yscale="log", title="text")
    left.yaxis.set_major_formatter("{x:.1f}")
    left.yaxis.set_minor_formatter("{x:.1f}")
    right.set(ylabel="accuracy in %", ylim=(0, 103), title="tasks: mean and standard deviation over seeds")
    right.set_xticks(range(len(tasks)), tasks)
    left.legend(fontsize=8)
    figure.savefig(path, dpi=120)


def run(options: argparse.Namespace, sizes: dict[str, Size]) -> Results:
    """Train every model that has no result file yet. Returns all results by model and task."""
    text = training.read_text(options.data)
    folder = options.out / "cells"
    folder.mkdir(parents=True, exist_ok=True)
    results: Results = {name: {task: [] for task in sizes} for name in options.blocks}
    cells = [(seed, task, name) for seed in range(options.seeds) for task in sizes for name in options.blocks]
    for index, (seed, task, name) in enumerate(cells, 1):
        path = folder / f"{name} - {task} - {seed}.json".replace(" ", "_")
        label, size, layers = f"{name}, {task}, seed {seed}", sizes[task], MODELS[name]
        settings = {"blocks": layers, "size": size._asdict(), "source": text.source if task == "text" else None}
        config = json.loads(json.dumps(settings))  # as in the file
        cell = json.loads(path.read_text()) if path.exists() else None
        if cell is None or cell["config"] != config:
            torch.manual_seed(seed)
            if task == "text":
                cell = learn_text(layers, size, text, seed, label)
            elif task == "recall across segments":
                cell = recall(layers, size, label)
            else:
                cell = solve(layers, size, task, label)
            temporary = path.with_suffix(".new")  # renamed, so that an interrupted run leaves no partial file
            temporary.write_text(json.dumps({**cell, "config": config}))
            temporary.replace(path)
            print(f"model {index} of {len(cells)}: {label}: {cell['score']:.3f}", flush=True)
        results[name][task].append(cell)
    return results


def parse_options() -> argparse.Namespace:
    """Parse and check the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--quick", action="store_true", help="smaller models, fewer steps, one seed")
    add(
        "--blocks",
        default=",".join(name for name in MODELS if name not in SLOW),
        help="models to compare (%(default)s)",
    )
    add("--tasks", default=",".join(FULL), help="tasks (%(default)s)")
    add("--seeds", type=int, help="number of runs per model, with seeds 0, 1, ... (3; with --quick 1)")
    add("--steps", type=int, help="training steps of every task (default: set per task)")
    add("--data", help="text file, or folder of text files (Python's standard library)")
    add("--out", type=Path, help="output folder (runs/compare_blocks; with --quick runs/compare_blocks_quick)")
    options = training.parse_options(parser)
    for name, known in (("blocks", MODELS), ("tasks", FULL)):
        chosen = getattr(options, name).split(",")
        unknown = [item for item in chosen if item not in known]
        if unknown:
            parser.error(f"--{name} must be among {', '.join(known)}, got {unknown[0]!r}")
        setattr(options, name, chosen)
    options.seeds = (1 if options.quick else 3) if options.seeds is None else options.seeds
    options.out = options.out or Path("runs/compare_blocks_quick" if options.quick else "runs/compare_blocks")
    return options


def main() -> None:
    """Train all models, print the table, save the plot."""
    options = parse_options()
    known = QUICK if options.quick else FULL
    sizes = {task: known[task] for task in options.tasks}
    if options.steps is not None:
        sizes = {task: size._replace(steps=options.steps) for task, size in sizes.items()}
    try:
        results = run(options, sizes)
    except KeyboardInterrupt:
        raise SystemExit("\nStopped. The same command continues with the missing models.") from None
    except (FileNotFoundError, ValueError) as error:
        sys.exit(f"error: {error}")
    lines = table(results, measure(options.blocks, known["text"]))
    (options.out / "compare_blocks.md").write_text(lines + "\n")
    plot(results, sizes, options.out / "compare_blocks.png")
    print(f"\n{lines}\n\nThe table and compare_blocks.png are in {options.out}.")


if __name__ == "__main__":
    main()
