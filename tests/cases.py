"""Every block in its variants: each row runs all contract checks."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from _pytest.mark.structures import ParameterSet
from torch import Tensor, nn

from attention_zoo import (
    ALiBi,
    AxialAttention,
    BlockSparseAttention,
    ConvAttention,
    CosineSimAttention,
    CrossAttention,
    FullAttention,
    GateLoopAttention,
    RelativeBias,
    RelativeGateAttention,
    Rotary,
    SimpleGateLoop,
    TalkingHeadsAttention,
    TextImageLayout,
    TextImageRotary,
    WindowAttention,
)
from attention_zoo.interop.dalle import RotatedAxialAttention
from attention_zoo.testing import Subject

DIM = 32
SMALL: dict[str, Any] = {"heads": 4, "dim_head": 8}
LENGTHS = (1, 2, 7, 64, 65, 131)
FEWER = (1, 7, 67)  # for variants whose loops are tested at all lengths by another case
LAYOUT = TextImageLayout(text_len=6, height=7, width=5)
# a prefix inside the text, one that ends at the border, one inside a row, one at its end, and all
PREFIXES = (4, 6, 19, 21, 41)
TALL = TextImageLayout(text_len=67, height=25, width=9)  # long enough for tiles, several of text and of narrow rows
IMAGE = TextImageLayout(text_len=0, height=17, width=18)
BY_INDEX: dict[str, Any] = {"shift_invariant": False}  # the position in the image is the index


@dataclass(frozen=True)
class Case:
    """A small block and its settings for the contract checks.

    Args:
        name: name in BLOCKS, optionally followed by a colon and the variant.
        make: constructs it with DIM features.
        causal: whether it is causal.
        lengths: sequence lengths to test.
        options: further fields of `Subject`, each an exception with a reason beside it.
    """

    name: str
    make: Callable[[], nn.Module]
    causal: bool = True
    lengths: tuple[int, ...] = FEWER
    options: Mapping[str, Any] = field(default_factory=dict)

    def subject(self, **changes: Any) -> Subject:
        settings = {"lengths": self.lengths, **self.options, **changes}
        return Subject(self.make, dim=DIM, causal=self.causal, **settings)


def context(batch: int, length: int) -> dict[str, Tensor]:
    """A context of 11 tokens with a mask; each row has at least one valid token."""
    mask = torch.rand(batch, 11) < 0.6
    mask[:, 3] = True
    return {"context": torch.randn(batch, 11, 24), "context_mask": mask}


def striped() -> Tensor:
    """Every token attends to itself and to every third token."""
    index = torch.arange(131)
    return (index[:, None] - index) % 3 == 0


CASES = [
    Case("full", lambda: FullAttention(DIM, **SMALL), lengths=LENGTHS),
    Case("full: bidirectional", lambda: FullAttention(DIM, causal=False, **SMALL), causal=False),
    Case("full: grouped heads, rotary", lambda: FullAttention(DIM, kv_heads=2, rotary=Rotary(), **SMALL)),
    Case(
        "full: half-split rotary, yarn",
        lambda: FullAttention(
            DIM,
            rotary=Rotary(
                6, theta=500.0, scaling={"type": "yarn", "factor": 4, "original_max_seq_len": 512}, pairing="half"
            ),
            **SMALL,
        ),
    ),
    Case("full: xpos", lambda: FullAttention(DIM, rotary=Rotary(xpos=True, xpos_scale_base=50.0), **SMALL)),
    Case("full: relative bias", lambda: FullAttention(DIM, bias=RelativeBias(4), **SMALL), lengths=(1, 7, 67, 131)),
    Case(
        "full: bidirectional, relative bias, biased projections",
        lambda: FullAttention(
            DIM, causal=False, bias=RelativeBias(4, causal=False), qkv_bias=True, out_bias=True, **SMALL
        ),
        causal=False,
    ),
    Case(
        "full: query-key RMSNorm, grouped heads, rotary",
        lambda: FullAttention(DIM, qk_norm="rms", kv_heads=2, rotary=Rotary(), **SMALL),
    ),
    Case(
        "full: l2-normalised queries and keys, relative bias",
        lambda: FullAttention(DIM, qk_norm="l2", scale=5.0, kv_heads=1, bias=RelativeBias(4), **SMALL),
    ),
    Case("full: ALiBi, grouped heads", lambda: FullAttention(DIM, bias=ALiBi(4), kv_heads=2, **SMALL)),
    Case(
        "full: bidirectional, ALiBi",
        lambda: FullAttention(DIM, causal=False, bias=ALiBi(4), **SMALL),
        causal=False,
    ),
    Case(
        "full: pattern",
        lambda: FullAttention(DIM, pattern=striped(), **SMALL),
        options={"shift_invariant": False},  # the pattern is tied to the index
    ),
    # lengths within one window, of several windows, and of several chunks of 64 queries
    Case("window", lambda: WindowAttention(DIM, window=5, rotary=Rotary(), **SMALL), lengths=LENGTHS),
    Case(
        "window: sinks, grouped heads, query-key norm",
        lambda: WindowAttention(DIM, window=9, sinks=3, kv_heads=2, rotary=Rotary(), qk_norm="rms", **SMALL),
        lengths=(1, 2, 7, 67, 131, 200),
    ),
    Case(
        "window: chunks, biased projections, output gate",
        lambda: WindowAttention(
            DIM, window=70, qk_norm="l2", scale=5.0, qkv_bias=True, out_bias=True, output_gate="silu", **SMALL
        ),
        lengths=(7, 67, 273),
    ),
    Case("window: its own token only", lambda: WindowAttention(DIM, window=1, sinks=1, **SMALL), lengths=(1, 7, 131)),
    Case(
        "window: longer than the sequences, as many sinks",
        lambda: WindowAttention(DIM, window=500, sinks=300, **SMALL),
    ),
    Case(
        "window: bidirectional, sinks",
        lambda: WindowAttention(DIM, window=9, sinks=3, kv_heads=1, causal=False, **SMALL),
        causal=False,
        lengths=(1, 7, 67, 200),
    ),
    Case(
        "cross",
        lambda: CrossAttention(DIM, context_dim=24, **SMALL),
        lengths=LENGTHS,
        options={"inputs": context},
    ),
    Case(
        "cross: biased projections",
        lambda: CrossAttention(DIM, context_dim=24, qkv_bias=True, out_bias=True, **SMALL),
        options={"inputs": context},
    ),
    Case(
        "cosine_sim",
        lambda: CosineSimAttention(DIM, groups=2, kv_heads=1, rotary=Rotary(), **SMALL),
        lengths=LENGTHS,
    ),
    Case(
        "cosine_sim: learned scale",
        lambda: CosineSimAttention(DIM, scale="learned", scale_seq_len=64, **SMALL),
    ),
    Case(
        "cosine_sim: learned scale per head, grouped heads, bias",
        lambda: CosineSimAttention(
            DIM, scale="learned", scale_per="head", scale_seq_len=9, kv_heads=2, bias=RelativeBias(4), **SMALL
        ),
    ),
    Case(
        "cosine_sim: bidirectional, bias",
        lambda: CosineSimAttention(DIM, causal=False, bias=RelativeBias(4, causal=False), **SMALL),
        causal=False,
    ),
    Case(
        "conv",
        lambda: ConvAttention(DIM, layout=LAYOUT, rotary=TextImageRotary(LAYOUT), **SMALL),
        lengths=PREFIXES,
        options=BY_INDEX,
    ),
    Case(
        "conv: causal window, dilation, tiles",
        lambda: ConvAttention(DIM, layout=TALL, window="causal", kernel_size=3, dilation=2, **SMALL),
        lengths=(273, 292),
        options=BY_INDEX,
    ),
    Case(
        "conv: wrapped window, tiles",
        lambda: ConvAttention(DIM, layout=TALL, window="wrapped", kernel_size=3, **SMALL),
        lengths=(273, 292),
        options=BY_INDEX,
    ),
    Case(
        "conv: bidirectional",
        lambda: ConvAttention(DIM, layout=LAYOUT, kernel_size=3, causal=False, **SMALL),
        causal=False,
        lengths=PREFIXES,
        options=BY_INDEX,
    ),
    Case(
        "conv: bidirectional, image, tiles",
        lambda: ConvAttention(DIM, layout=IMAGE, kernel_size=3, dilation=2, causal=False, **SMALL),
        causal=False,
        lengths=(293, 306, 7),
        options=BY_INDEX,
    ),
    Case(
        "axial_row",
        lambda: AxialAttention(DIM, layout=LAYOUT, rotary=TextImageRotary(LAYOUT), out_bias=True, **SMALL),
        lengths=PREFIXES,
        options=BY_INDEX,
    ),
    Case(
        "axial_row: rotated values",
        lambda: RotatedAxialAttention(DIM, layout=LAYOUT, rotary=TextImageRotary(LAYOUT), out_bias=True, **SMALL),
        lengths=PREFIXES,
        options=BY_INDEX,
    ),
    Case(
        "axial_row: tiles",
        lambda: AxialAttention(DIM, layout=TALL, **SMALL),
        lengths=(273, 292),
        options=BY_INDEX,
    ),
    Case(
        "axial_row: wrapped, tiles",
        lambda: AxialAttention(DIM, layout=TALL, axis="wrapped_row", **SMALL),
        lengths=(273, 292),
        options=BY_INDEX,
    ),
    Case(
        "axial_row: bidirectional, image",
        lambda: AxialAttention(DIM, layout=IMAGE, causal=False, **SMALL),
        causal=False,
        lengths=(18, 306, 293, 7),
        options=BY_INDEX,
    ),
    Case(
        "axial_col",
        lambda: AxialAttention(DIM, layout=LAYOUT, axis="column", rotary=TextImageRotary(LAYOUT), **SMALL),
        lengths=PREFIXES,
        options=BY_INDEX,
    ),
    Case(
        "axial_col: tiles",
        lambda: AxialAttention(DIM, layout=TALL, axis="column", **SMALL),
        lengths=(273, 292),
        options=BY_INDEX,
    ),
    Case(
        "axial_col: image",
        lambda: AxialAttention(DIM, layout=IMAGE, axis="column", **SMALL),
        lengths=(17, 18, 40),
        options=BY_INDEX,
    ),
    Case(
        "axial_col: bidirectional",
        lambda: AxialAttention(
            DIM, layout=LAYOUT, axis="column", causal=False, rotary=TextImageRotary(LAYOUT), **SMALL
        ),
        causal=False,
        lengths=PREFIXES,
        options=BY_INDEX,
    ),
    Case(
        "block_sparse",
        lambda: BlockSparseAttention(DIM, layout=LAYOUT, block_size=4, local_blocks=2, random_blocks=1, **SMALL),
        lengths=PREFIXES,
        options=BY_INDEX,
    ),
    Case(
        "block_sparse: tiles",
        lambda: BlockSparseAttention(DIM, layout=TALL, block_size=32, local_blocks=2, random_blocks=1, **SMALL),
        lengths=(273, 292),
        options=BY_INDEX,
    ),
    Case(
        "block_sparse: bidirectional, tiles",
        lambda: BlockSparseAttention(
            DIM, layout=TALL, block_size=32, local_blocks=2, random_blocks=1, causal=False, **SMALL
        ),
        causal=False,
        lengths=(273, 292, 7),
        options=BY_INDEX,
    ),
    Case("talking_heads", lambda: TalkingHeadsAttention(DIM, **SMALL), lengths=LENGTHS),
    Case("talking_heads: mlp", lambda: TalkingHeadsAttention(DIM, pre_softmax="mlp", post_softmax="mlp", **SMALL)),
    Case("talking_heads: pre only", lambda: TalkingHeadsAttention(DIM, post_softmax=None, **SMALL)),
    Case("talking_heads: post only", lambda: TalkingHeadsAttention(DIM, pre_softmax=None, **SMALL)),
    Case("talking_heads: rotary", lambda: TalkingHeadsAttention(DIM, rotary=Rotary(), **SMALL)),
    Case("talking_heads: none", lambda: TalkingHeadsAttention(DIM, pre_softmax=None, post_softmax=None, **SMALL)),
    Case(
        "talking_heads: 2 streams, bidirectional",
        lambda: TalkingHeadsAttention(DIM, streams=2, causal=False, post_softmax="mlp", **SMALL),
        causal=False,
        options={"streams": 2},
    ),
    Case(
        "talking_heads: 3 streams",
        lambda: TalkingHeadsAttention(DIM, streams=3, **SMALL),
        options={"streams": 3},
    ),
    Case(
        "talking_heads: fewer heads before and after the softmax, no gate",
        lambda: TalkingHeadsAttention(DIM, qk_heads=2, v_heads=3, output_gate=None, **SMALL),
    ),
    Case(
        "talking_heads: 2 streams, more heads before and after the softmax",
        lambda: TalkingHeadsAttention(DIM, heads=2, qk_heads=3, v_heads=4, dim_head=8, streams=2),
        options={"streams": 2},
    ),
    Case("gate_loop", lambda: GateLoopAttention(DIM), options={"gradient_is_exact": False}),
    Case("gate_loop: exact gradients", lambda: GateLoopAttention(DIM, gradient_fraction=1.0), lengths=LENGTHS),
    Case("gate_loop: 4 heads", lambda: GateLoopAttention(DIM, heads=4, gradient_fraction=1.0), lengths=LENGTHS),
    Case(
        "gate_loop: inner features, sub-norm",
        lambda: GateLoopAttention(DIM, heads=4, dim_inner=48, sub_norm=True, gradient_fraction=1.0),
        options={"empty_is_zero": True},  # before the first valid token the bias of the sub-norm is masked
    ),
    Case(
        "gate_loop: real gate, no swish",
        lambda: GateLoopAttention(DIM, heads=8, gate="real", output_gate=None, gradient_fraction=1.0),
        # under autocast x is rounded, and the gate jumps from -1/2 to 1/2 where z changes its sign
        options={"bf16_error": 0.1},
    ),
    Case("gate_loop: no transition", lambda: GateLoopAttention(DIM, heads=4, gate=None)),
    Case(
        "gate_loop: reverse",
        lambda: GateLoopAttention(DIM, reverse=True, gradient_fraction=1.0),
        causal=False,
        # under autocast z is rounded, which turns the phase of gates with a small |z|, in both directions
        options={"bf16_error": 0.1},
    ),
    Case(
        "gate_loop: 4 heads, sub-norm, reverse",
        lambda: GateLoopAttention(DIM, heads=4, sub_norm=True, reverse=True, gradient_fraction=1.0),
        causal=False,
        options={"empty_is_zero": True},  # before the first valid token the bias of the sub-norm is masked
    ),
    Case("simple_gate_loop", lambda: SimpleGateLoop(DIM), lengths=LENGTHS),
    Case("simple_gate_loop: no norm, post-norm", lambda: SimpleGateLoop(DIM, norm=False, post_norm=True)),
    Case("simple_gate_loop: reverse", lambda: SimpleGateLoop(DIM, reverse=True), causal=False),
    Case(
        "relative_gate",
        lambda: RelativeGateAttention(DIM, gradient_fraction=1.0, **SMALL),
        lengths=(1, 2, 7, 31, 33, 67),
    ),
    Case(
        "relative_gate: raw scores, rotary, biased output",
        lambda: RelativeGateAttention(
            DIM, softmax=False, rotary=Rotary(), out_bias=True, output_gate=None, gradient_fraction=1.0, **SMALL
        ),
    ),
]


def one_per_block(cases: Sequence[Case]) -> list[ParameterSet]:
    """The cases as test parameters: the first of every block by default, and the variants among the slow tests."""
    return [pytest.param(case, id=case.name, marks=[pytest.mark.slow] * (":" in case.name)) for case in cases]
