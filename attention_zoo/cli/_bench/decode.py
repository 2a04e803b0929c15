"""How fast a language model decodes, what a late token costs beside an early one, and how large its state is."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from attention_zoo.attention import BLOCKS
from attention_zoo.cli._bench.blocks import layout_for
from attention_zoo.cli._bench.measure import Setup, compare, median_seconds
from attention_zoo.generation import generate
from attention_zoo.models import LanguageModel

NUM_TOKENS = 256
PROMPT = 256
NEW = 256
EARLY = 100
LATE = 1000
WINDOW = 32  # tokens timed around EARLY and around LATE
LONGEST = 1280  # tokens of text and image, beyond all of these


@dataclass(frozen=True)
class Decoding:
    """How a language model decoded, batch 1.

    Attributes:
        block: the attention of every layer.
        prompt, new: tokens before, and tokens generated.
        tokens_per_second: new tokens by the time of `generate`, prompt and sampling included.
        early_ms, late_ms: median milliseconds of a step at token 100 and at token 1000.
        ratio: late over early, the median over pairs of steps.
        early_bytes, late_bytes: size of the state after token 100 and after token 1000.
    """

    block: str
    prompt: int
    new: int
    tokens_per_second: float
    early_ms: float
    late_ms: float
    ratio: float
    early_bytes: int
    late_bytes: int


def measure_decoding(block: str, setup: Setup) -> Decoding:
    """Decode with a language model of random weights, batch 1.

    Args:
        block: a name in BLOCKS, the attention of every layer.
        setup: its sizes and its place.

    Raises:
        ValueError: the block cannot be decoded without a context, or a size does not fit it.
    """
    known = inspect.signature(BLOCKS[block]).parameters
    # a block whose heads have no size of their own decodes with its own number of them
    heads: dict[str, Any] = {"heads": setup.heads, "dim_head": setup.dim_head} if "dim_head" in known else {}
    # a block that knows images decodes text and then an image
    attention: Any = (block, {"layout": layout_for(LONGEST)}) if "layout" in known else block
    model = LanguageModel(num_tokens=NUM_TOKENS, dim=setup.dim, depth=setup.depth, attention=attention, **heads)
    model = model.to(setup.device, setup.dtype).eval()
    prompt = torch.randint(NUM_TOKENS, (1, PROMPT), device=setup.device)
    taken = median_seconds(lambda: generate(model, prompt, NEW), setup.device, setup.runs)
    with torch.no_grad():
        sizes = [_prefill(model, position).nbytes for position in (EARLY, LATE)]
        # Two sequences side by side, so that what slows the machine for a while slows an early and a late token alike.
        late, early = (_stepper(model, position - WINDOW // 2) for position in (LATE, EARLY))
        late_time, early_time, ratio = compare(late, early, setup.device, WINDOW)
    return Decoding(block, PROMPT, NEW, NEW / taken, early_time * 1000, late_time * 1000, ratio, *sizes)


def _prefill(model: LanguageModel, position: int) -> Any:
    """The state of a model that has seen `position` tokens."""
    device = model.token_embedding.weight.device
    return model.step(torch.randint(NUM_TOKENS, (1, position), device=device))[1]


def _stepper(model: LanguageModel, position: int) -> Callable[[], None]:
    """A call that feeds one more token to a model that has seen `position` of them."""
    token = torch.zeros(1, 1, dtype=torch.int64, device=model.token_embedding.weight.device)
    state = _prefill(model, position)

    def step() -> None:
        nonlocal state
        state = model.step(token, state)[1]

    return step
