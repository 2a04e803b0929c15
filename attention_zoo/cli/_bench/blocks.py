"""Time and memory of attention layers, next to torch's scaled_dot_product_attention (SDPA)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from attention_zoo.attention import BlockSparseAttention, CrossAttention, GateLoopAttention, SelfAttention
from attention_zoo.cli._bench.measure import WARM_UP, Call, compare, median_seconds, peak_bytes
from attention_zoo.cli._bench.setup import Setup
from attention_zoo.cli._targets import accepted, find_block, layout_for, make_block, reads_context, required
from attention_zoo.ops import gate_loop, softmax_attention, unit_gate

PHASES = ("forward", "training")
WINDOW = 128  # tokens of the window of a layer that needs one


class Mixing(NamedTuple):
    """The part of a layer that is compared with SDPA.

    Attributes:
        run: the operation.
        inputs: its arguments.
        causal: whether SDPA is causal.
        mask: the mask of SDPA, (n, n) bool, for layers with an image pattern.
        whole: whether the operation is the whole layer.
    """

    run: Callable[..., Tensor]
    inputs: tuple[Tensor, ...]
    causal: bool
    mask: Tensor | None = None
    whole: bool = False


@dataclass(frozen=True)
class BlockCost:
    """Cost of one phase of a layer at one length: median milliseconds, peak bytes beyond inputs and weights.

    Attributes:
        block: name of the layer.
        length: number of tokens n.
        phase: "forward" (without gradients) or "training" (forward and backward to inputs and weights).
        block_ms, block_bytes: the whole layer, projections included.
        mixing_ms, mixing_bytes: the layer without projections, from queries, keys and values to the output.
        sdpa_ms, sdpa_bytes: SDPA with the same number and size of heads, causal if the layer is; under the same mask
            for layers that attend to a window or an axis of an image.
        ratio: mixing over SDPA, the median over pairs timed alternately.
        whole: whether mixing is the whole layer, because the layer has no separate operation.
        tokens_per_second: of the whole layer in this phase.
        step_ms, state_bytes: decoding the last of `length` tokens, and the state after it; None in training and for
            layers without `step`.
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


def build_block(name: str, length: int, setup: Setup) -> nn.Module:
    """A layer with default arguments, except for sizes, layout and window where its constructor needs them.

    Args:
        name: name in BLOCKS, or `module:Class`.
        length: number of tokens of the layout.
        setup: sizes, device and dtype.
    """
    make = find_block(name)
    sizes = accepted(make, heads=setup.heads, dim_head=setup.dim_head, layout=layout_for(length))
    return make_block(make, name, setup.dim, required(make, window=WINDOW) | sizes).to(setup.device, setup.dtype)


def block_inputs(block: nn.Module, length: int, setup: Setup) -> tuple[Tensor, ...]:
    """Random features (b, n, d), and a context of the same shape for a layer that takes one."""
    return tuple(setup.randn(setup.batch, length, setup.dim) for _ in range(1 + reads_context(block)))


def head_inputs(length: int, setup: Setup) -> tuple[Tensor, ...]:
    """Random q, k and v, (b, h, n, e), with the memory layout of projections: heads inside tokens."""
    return tuple(setup.randn(setup.batch, length, setup.heads, setup.dim_head).transpose(1, 2) for _ in range(3))


def mixing(block: nn.Module, length: int, setup: Setup) -> Mixing:
    """The part of a layer that is compared with SDPA: its operation if that can run alone, or else the whole layer."""
    if isinstance(block, SelfAttention):
        prepare, attend = block.prepare, block.attend  # `prepare` may normalize q and k
        pattern = None if isinstance(block, BlockSparseAttention) else block.pattern
        mask = None if pattern is None else pattern().mask(0, length, setup.device)
        heads = head_inputs(length, setup)
        return Mixing(lambda q, k, v: attend(prepare(q, 0), prepare(k, 0), v, None), heads, block.causal, mask)
    if isinstance(block, CrossAttention):
        return Mixing(softmax_attention, head_inputs(length, setup), causal=False)
    if isinstance(block, GateLoopAttention):
        gate = unit_gate(setup.randn(setup.batch, length, block.heads, 2)).transpose(1, 2)
        heads = head_inputs(length, replace(setup, heads=block.heads, dim_head=block.dim_head))
        return Mixing(lambda q, k, v: gate_loop(q, k, v, gate).out, heads, causal=True)
    inputs = block_inputs(block, length, setup)
    return Mixing(block, inputs, causal=bool(getattr(block, "causal", True)), whole=True)


def measure_block(name: str, block: nn.Module, length: int, phase: str, setup: Setup) -> BlockCost:
    """Measure one phase of a layer and of SDPA.

    Args:
        name: name of the layer.
        block: result of `build_block`.
        length: number of tokens n.
        phase: one of PHASES.
        setup: sizes, device and number of timed calls.
    """
    device, runs = setup.device, setup.runs
    block.train(phase == "training")
    part = mixing(block, length, setup)

    def sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        causal = part.causal and part.mask is None
        return F.scaled_dot_product_attention(q, k, v, attn_mask=part.mask, is_causal=causal)

    mixing_call = timed_call(phase, setup.compile(part.run), part.inputs, block)
    sdpa_call = timed_call(phase, sdpa, head_inputs(length, setup) if part.whole else part.inputs)
    mixing_time, sdpa_time, ratio = compare(mixing_call, sdpa_call, device, runs)
    mixing_peak, sdpa_peak = peak_bytes(mixing_call, device), peak_bytes(sdpa_call, device)
    block_time, block_peak = mixing_time, mixing_peak
    if not part.whole:
        block_call = timed_call(phase, setup.compile(block), block_inputs(block, length, setup), block)
        block_time, block_peak = median_seconds(block_call, device, runs), peak_bytes(block_call, device)
    times = (block_time * 1000, mixing_time * 1000, sdpa_time * 1000, ratio)
    step = measure_step(block, length, setup) if phase == "forward" else (None, None)
    speed = setup.batch * length / block_time
    return BlockCost(name, length, phase, *times, block_peak, mixing_peak, sdpa_peak, part.whole, speed, *step)


def measure_step(block: nn.Module, length: int, setup: Setup) -> tuple[float | None, int | None]:
    """Milliseconds to decode one token after about `length` tokens, and the size of the final state in bytes."""
    steps = WARM_UP + setup.runs
    step: Any = getattr(block, "step", None)
    if not callable(step) or not getattr(block, "causal", True) or length <= steps:
        return None, None
    x, *context = block_inputs(block, length, setup)
    with torch.inference_mode():
        try:
            _, state = step(x[:, :-steps], **({"context": context[0]} if context else {}))
        except NotImplementedError:  # by `AttentionBlock.step`
            return None, None
        positions = iter(range(length - steps, length))

        def decode() -> None:
            nonlocal state
            position = next(positions)
            _, state = step(x[:, position : position + 1], state)

        taken = median_seconds(decode, setup.device, setup.runs)
    return taken * 1000, int(state.nbytes)


def measure_blocks(names: Sequence[str], lengths: Sequence[int], setup: Setup) -> Iterator[BlockCost]:
    """Measure each layer at each length in both phases."""
    for name in names:
        for length in lengths:
            block = build_block(name, length, setup)
            for phase in PHASES:
                yield measure_block(name, block, length, phase, setup)


def timed_call(
    phase: str, run: Callable[..., Tensor], inputs: Sequence[Tensor], block: nn.Module | None = None
) -> Call:
    """A call of `run`; in training with the gradients of `inputs` and of the weights of `block`."""
    if phase == "forward":
        return torch.no_grad()(lambda: run(*inputs))
    leaves = [tensor.detach().requires_grad_() for tensor in inputs]
    weights = [] if block is None else list(block.parameters())
    upstream = torch.randn_like(run(*leaves))
    # Unused weights: those of the projections, which are not part of the mixing.
    return lambda: torch.autograd.grad(run(*leaves), [*leaves, *weights], upstream, allow_unused=True)
