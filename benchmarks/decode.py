"""Decoding with a language model: tokens per second, a late step relative to an early one, size of the state."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from attention_zoo.attention import BLOCKS
from attention_zoo.cli._bench.measure import compare, median_seconds
from attention_zoo.cli._bench.setup import Setup
from attention_zoo.cli._table import print_rows
from attention_zoo.cli._targets import accepted, required
from attention_zoo.generation import generate
from attention_zoo.models import LanguageModel
from attention_zoo.ops import TextImageLayout

NUM_TOKENS = 256
PROMPT = 256
NEW = 256
EARLY = 100
LATE = 1000
WINDOW = 32  # number of timed tokens around EARLY and around LATE
LAYOUT = TextImageLayout(text_len=256, height=32, width=32)  # longer than PROMPT + NEW and than LATE + WINDOW
KIB = 2**10
COLUMNS = {
    "block": f"<{max(map(len, BLOCKS))}",
    "tokens/s": ">8",
    f"ms at {EARLY}": ">9",
    f"ms at {LATE}": ">10",
    "ratio": ">6",
    f"KiB at {EARLY}": ">10",
    f"KiB at {LATE}": ">11",
}


@dataclass(frozen=True)
class Decoding:
    """Decoding with batch size 1.

    Attributes:
        block: the attention layers of the model.
        depth: number of layers of the model.
        prompt, new: number of prompt tokens and of generated tokens.
        tokens_per_second: generated tokens over the time of `generate`, prompt and sampling included.
        early_ms, late_ms: median milliseconds of a step at token EARLY and at token LATE.
        ratio: late over early, the median over pairs of steps.
        early_bytes, late_bytes: size of the state after EARLY and after LATE tokens.
    """

    block: str
    depth: int
    prompt: int
    new: int
    tokens_per_second: float
    early_ms: float
    late_ms: float
    ratio: float
    early_bytes: int
    late_bytes: int


def run(setup: Setup, args: argparse.Namespace) -> list[Decoding]:
    """Measure one model per layer in `args.blocks` with `args.depth` layers."""

    def cells(row: Decoding) -> tuple[str | float, ...]:
        times = (row.tokens_per_second, row.early_ms, row.late_ms, row.ratio)
        return (row.block, *times, row.early_bytes / KIB, row.late_bytes / KIB)

    print(f"depth {args.depth}, {PROMPT} tokens of prompt and {NEW} new ones\n")
    return print_rows(COLUMNS, (measure_decoding(block, setup, args.depth) for block in args.blocks), cells)


def measure_decoding(block: str, setup: Setup, depth: int) -> Decoding:
    """Measure a language model with random weights.

    Args:
        block: name in BLOCKS of the attention layers. An image layer decodes text followed by an image.
        setup: sizes, device, dtype and number of runs.
        depth: number of layers.

    Raises:
        ValueError: the layer needs a context, or does not support a size.
    """
    needed = accepted(BLOCKS[block], layout=LAYOUT) | required(BLOCKS[block], window=128)
    heads: dict[str, Any] = {"heads": setup.heads, "dim_head": setup.dim_head}
    model = LanguageModel(
        num_tokens=NUM_TOKENS,
        dim=setup.dim,
        depth=depth,
        attention=(block, needed),
        **(heads if accepted(BLOCKS[block], dim_head=setup.dim_head) else {}),
    )
    model = model.to(setup.device, setup.dtype).eval()
    prompt = torch.randint(NUM_TOKENS, (1, PROMPT), device=setup.device)
    taken = median_seconds(lambda: generate(model, prompt, NEW), setup.device, setup.runs)
    with torch.no_grad():
        sizes = [_prefill(model, position).nbytes for position in (EARLY, LATE)]
        # Alternately, so that a temporary slowdown of the machine affects early and late steps.
        late, early = (_stepper(model, position - WINDOW // 2) for position in (LATE, EARLY))
        late_time, early_time, ratio = compare(late, early, setup.device, WINDOW)
    return Decoding(block, depth, PROMPT, NEW, NEW / taken, early_time * 1000, late_time * 1000, ratio, *sizes)


def _prefill(model: LanguageModel, position: int) -> Any:
    """The state after `position` random tokens."""
    device = model.token_embedding.weight.device
    return model.step(torch.randint(NUM_TOKENS, (1, position), device=device))[1]


def _stepper(model: LanguageModel, position: int) -> Callable[[], None]:
    """A call that decodes one more token, starting after `position` tokens."""
    token = torch.zeros(1, 1, dtype=torch.int64, device=model.token_embedding.weight.device)
    state = _prefill(model, position)

    def step() -> None:
        nonlocal state
        state = model.step(token, state)[1]

    return step
