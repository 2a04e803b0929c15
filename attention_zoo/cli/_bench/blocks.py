"""What a block costs, whole and in its mixing, beside torch's scaled_dot_product_attention (SDPA)."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from attention_zoo.attention import (
    AttentionBlock,
    BlockSparseAttention,
    CrossAttention,
    GateLoopAttention,
    SelfAttention,
    TalkingHeadsAttention,
)
from attention_zoo.cli._bench.measure import WARM_UP, Call, Setup, compare, median_seconds, peak_bytes
from attention_zoo.cli._targets import find_block, make_block
from attention_zoo.ops.gate_loop import gate_loop
from attention_zoo.ops.gate_loop.gates import unit_gate
from attention_zoo.ops.softmax import softmax_attention
from attention_zoo.ops.sparse.image_layout import TextImageLayout

PHASES = ("forward", "training")


class Mixing(NamedTuple):
    """The part of a block that is compared to SDPA.

    Attributes:
        run: from `inputs` to an output.
        inputs: what it is given.
        causal: whether SDPA beside it is causal.
        whole: it is the whole block, for want of a narrower part.
        seen: the mask that SDPA beside it gets, (n, n) bool, where it computes the same under one.
    """

    run: Callable[..., Tensor]
    inputs: tuple[Tensor, ...]
    causal: bool
    whole: bool = False
    seen: Tensor | None = None


@dataclass(frozen=True)
class BlockCost:
    """What one phase of one block costs at one length: median milliseconds, and peak bytes beyond inputs and weights.

    Attributes:
        block: its name in BLOCKS.
        length: tokens n.
        phase: "forward", without gradients; or "training", forward and backward to inputs and weights.
        block_ms, block_bytes: the whole block, projections included.
        mixing_ms, mixing_bytes: what it does to queries, keys and values that are already projected.
        sdpa_ms, sdpa_bytes: SDPA with as many heads of the same size, causal where the block is; under the block's own
            mask where it sees a window or an axis of an image.
        ratio: mixing over SDPA, the median over pairs timed in turn.
        whole: the mixing is the whole block, because this block offers nothing narrower.
        tokens_per_second: of the whole block in this phase.
        step_ms, state_bytes: decoding the last of `length` tokens, and the state after it; None in training, and for a
            block without step.
    """

    block: str
    length: int
    phase: str
    block_ms: float
    mixing_ms: float
    sdpa_ms: float
    ratio: float
    block_bytes: int
    mixing_bytes: int
    sdpa_bytes: int
    whole: bool
    tokens_per_second: float
    step_ms: float | None
    state_bytes: int | None


def layout_for(length: int) -> TextImageLayout:
    """Text and a square image of together `length` tokens: about 256 of text, or a fifth where that is less."""
    side = max(1, math.isqrt(length - min(256, length // 5)))
    return TextImageLayout(length - side * side, side, side)


def build_block(name: str, length: int, setup: Setup) -> nn.Module:
    """A block with its own defaults but for sizes and layout, of which it gets those that it has an argument for.

    Args:
        name: in BLOCKS, or `module:Class`.
        length: tokens of the layout, for a block that knows images.
        setup: sizes and place.
    """
    make = find_block(name)
    known = inspect.signature(make).parameters
    sizes: dict[str, Any] = {"heads": setup.heads, "dim_head": setup.dim_head, "layout": layout_for(length)}
    block = make_block(make, name, setup.dim, {key: size for key, size in sizes.items() if key in known})
    return block.to(setup.device, setup.dtype)


def block_inputs(block: nn.Module, length: int, setup: Setup) -> tuple[Tensor, ...]:
    """Random features (1, n, d) for the block's `forward`: x, and a context of the same length where it reads one."""
    count = 1 + ("context" in inspect.signature(block.forward).parameters)
    return tuple(_random(setup, 1, length, setup.dim) for _ in range(count))


def head_inputs(length: int, setup: Setup) -> tuple[Tensor, Tensor, Tensor]:
    """Random q, k and v, (1, h, n, e), laid out in memory as projections leave them: heads inside tokens."""
    q, k, v = (_random(setup, 1, length, setup.heads, setup.dim_head).transpose(1, 2) for _ in range(3))
    return q, k, v


def mixing(block: nn.Module, length: int, setup: Setup) -> Mixing:
    """What of this block is compared to SDPA. A kind of block that can run its mixing alone gets a branch here."""
    if isinstance(block, SelfAttention):

        def mix(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            q, k = block.prepare(q, 0), block.prepare(k, 0)  # a norm of queries and keys is part of how a block mixes
            return block.attend(q, k, v, None)

        seen = None
        if block.pattern is not None and not isinstance(block, BlockSparseAttention):
            seen = block.pattern().mask(0, length, setup.device)
        return Mixing(mix, head_inputs(length, setup), block.causal, seen=seen)
    if isinstance(block, TalkingHeadsAttention):
        return Mixing(lambda q, k, v: block.attend(q, k, v, None), head_inputs(length, setup), block.causal)
    if isinstance(block, CrossAttention):
        return Mixing(softmax_attention, head_inputs(length, setup), causal=False)
    if isinstance(block, GateLoopAttention):
        q, k, v = (_random(setup, 1, length, block.heads, block.dim_head).transpose(1, 2) for _ in range(3))

        def loop(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return gate_loop(q, k, v, gate).out

        gate = unit_gate(_random(setup, 1, length, block.heads, 2)).transpose(1, 2)
        return Mixing(loop, (q, k, v), causal=True)
    causal = bool(getattr(block, "causal", True))
    return Mixing(block, block_inputs(block, length, setup), causal, whole=True)


def measure_block(name: str, block: nn.Module, length: int, phase: str, setup: Setup) -> BlockCost:
    """Time one phase of a block and of SDPA, batch 1, and take their peak memory.

    Args:
        name: what the block is called.
        block: what `build_block` made of this setup.
        length: tokens n.
        phase: one of PHASES.
        setup: sizes, place, and the number of timed calls.
    """
    device, runs = setup.device, setup.runs
    block.train(phase == "training")
    part = mixing(block, length, setup)
    heads = head_inputs(length, setup) if part.whole else part.inputs

    def sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        causal = part.causal and part.seen is None
        return F.scaled_dot_product_attention(q, k, v, attn_mask=part.seen, is_causal=causal)

    mix_call = _call(phase, part.run, part.inputs, block)
    sdpa_call = _call(phase, sdpa, heads)
    mix_time, sdpa_time, ratio = compare(mix_call, sdpa_call, device, runs)
    mix_peak, sdpa_peak = peak_bytes(mix_call, device), peak_bytes(sdpa_call, device)
    block_time, block_peak = mix_time, mix_peak
    if not part.whole:
        block_call = _call(phase, block, block_inputs(block, length, setup), block)
        block_time, block_peak = median_seconds(block_call, device, runs), peak_bytes(block_call, device)
    times = (block_time * 1000, mix_time * 1000, sdpa_time * 1000, ratio)
    step = measure_step(block, length, setup) if phase == "forward" else (None, None)
    speed = length / block_time
    return BlockCost(name, length, phase, *times, block_peak, mix_peak, sdpa_peak, part.whole, speed, *step)


def measure_step(block: nn.Module, length: int, setup: Setup) -> tuple[float | None, int | None]:
    """Milliseconds for a token decoded when about `length` came before, and the bytes of the state at the end."""
    steps = WARM_UP + setup.runs
    decodes = callable(getattr(block, "step", None)) and getattr(type(block), "step", None) is not AttentionBlock.step
    if not decodes or not getattr(block, "causal", True) or length <= steps:
        return None, None
    step: Any = block.step
    x, *others = block_inputs(block, length, setup)
    with torch.inference_mode():
        _, state = step(x[:, :-steps], **({"context": others[0]} if others else {}))
        places = iter(range(length - steps, length))

        def decode() -> None:
            nonlocal state
            place = next(places)
            _, state = step(x[:, place : place + 1], state)

        taken = median_seconds(decode, setup.device, setup.runs)
    return taken * 1000, int(state.nbytes)


def measure_blocks(names: Sequence[str], lengths: Sequence[int], setup: Setup) -> Iterator[BlockCost]:
    """Measure each block at each length in both phases, one after the other."""
    for name in names:
        for length in lengths:
            block = build_block(name, length, setup)
            for phase in PHASES:
                yield measure_block(name, block, length, phase, setup)


def _call(phase: str, run: Callable[..., Tensor], inputs: Sequence[Tensor], block: nn.Module | None = None) -> Call:
    """A call of `run` on these inputs; in training one that also takes the gradients of inputs and weights."""
    if phase == "forward":

        def forward() -> Tensor:
            with torch.no_grad():
                return run(*inputs)

        return forward
    leaves = [tensor.detach().requires_grad_() for tensor in inputs]
    weights = [] if block is None else list(block.parameters())
    upstream = torch.randn_like(run(*leaves))  # the gradient that the layers above would send

    def training() -> object:
        # Projections play no part in the mixing, so their weights have no gradient there.
        return torch.autograd.grad(run(*leaves), [*leaves, *weights], upstream, allow_unused=True)

    return training


def _random(setup: Setup, *shape: int) -> Tensor:
    return torch.randn(shape, device=setup.device, dtype=setup.dtype)
