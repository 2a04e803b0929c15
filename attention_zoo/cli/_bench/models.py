"""Training speed of language models, next to the same model with full attention."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch

from attention_zoo.attention import BLOCKS, capabilities
from attention_zoo.cli._bench.measure import Call, compare
from attention_zoo.cli._bench.setup import Setup
from attention_zoo.cli._table import print_rows
from attention_zoo.cli._targets import accepted
from attention_zoo.models import LanguageModel

COLUMNS = {
    title: f">{len(title)}"
    for title in (" length", "parameters", "   step ms", "  tokens/s", "full tokens/s", "speed over full")
}


@dataclass(frozen=True)
class ModelCost:
    """Cost of a training step of a language model: loss, backward and AdamW.

    Attributes:
        block: names of its attention layers, joined by + if they are cycled over the depth.
        length: number of tokens n of a row.
        parameters: number of parameters of the model.
        step_ms, full_ms: median milliseconds of a step, and of one of the same model with full attention, which runs on
            SDPA.
        tokens_per_second, full_tokens_per_second: of training.
        ratio: speed over that of full attention, the median over pairs timed alternately.
    """

    block: str
    length: int
    parameters: int
    step_ms: float
    full_ms: float
    tokens_per_second: float
    full_tokens_per_second: float
    ratio: float


def decoder_blocks(names: Sequence[str]) -> list[str]:
    """The named layers; without names, all layers that a language model takes. "a+b" are layers cycled over the depth.

    Raises:
        ValueError: a named layer needs an image layout or a context.
    """
    can = capabilities()
    known = [name for name in BLOCKS if not (can[name].image or can[name].context)]
    for name in [part for joined in names for part in joined.split("+")]:
        if name not in known:
            raise ValueError(f"blocks must be registered layers of text without a context with --model, got {name}")
    return list(names) or known


def measure_models(
    names: Sequence[str], lengths: Sequence[int], depth: int, num_tokens: int, setup: Setup
) -> Iterator[ModelCost]:
    """Measure a language model of each layer at each length."""
    for name in names:
        for length in lengths:
            model, full = (make_model(block, depth, num_tokens, setup) for block in (name, "full"))
            tokens = torch.randint(num_tokens, (setup.batch, length), device=setup.device)
            step, full_step = (training_step(one, tokens, setup) for one in (model, full))
            taken, full_taken, ratio = compare(step, full_step, setup.device, setup.runs)
            parameters = sum(parameter.numel() for parameter in model.parameters())
            speed, full_speed = (tokens.numel() / time for time in (taken, full_taken))
            yield ModelCost(name, length, parameters, taken * 1000, full_taken * 1000, speed, full_speed, 1 / ratio)


def make_model(block: str, depth: int, num_tokens: int, setup: Setup) -> LanguageModel:
    """A language model with tied embeddings, as in GPT-2, and the heads of `setup` in layers that take them."""

    def layer(name: str) -> tuple[str, dict[str, int]]:
        heads = accepted(BLOCKS[name], heads=setup.heads, dim_head=setup.dim_head)
        return name, heads if "dim_head" in heads else {}  # gate loops have a head per channel by default

    layers = [layer(name) for name in block.split("+")]
    model = LanguageModel(num_tokens=num_tokens, dim=setup.dim, depth=depth, attention=layers, tie_embeddings=True)
    return model.to(setup.device)


def training_step(model: LanguageModel, tokens: torch.Tensor, setup: Setup) -> Call:
    """A call that trains for one step, with float32 weights and activations in the dtype of `setup`."""
    optimizer = torch.optim.AdamW(model.parameters())
    loss = setup.compile(model.loss)

    def step() -> None:
        with torch.autocast(setup.device.type, setup.dtype, enabled=setup.dtype != torch.float32):
            value = loss(tokens)
        torch.autograd.backward(value)
        optimizer.step()
        optimizer.zero_grad()

    return step


def print_models(costs: Iterable[ModelCost], names: Sequence[str]) -> list[ModelCost]:
    """Print one row per model, as soon as it is measured. Returns the costs."""
    columns = {"block": f"<{max(map(len, names))}", **COLUMNS}

    def cells(cost: ModelCost) -> Sequence[str | float]:
        speeds = (int(cost.tokens_per_second), int(cost.full_tokens_per_second))
        return (cost.block, cost.length, cost.parameters, cost.step_ms, *speeds, cost.ratio)

    return print_rows(columns, costs, cells)
