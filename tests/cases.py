"""One table of every block in its variants: a row here buys a block all contract tests."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from attention_zoo import (
    CosineSimAttention,
    CrossAttention,
    FullAttention,
    GateLoopAttention,
    RelativeBias,
    RelativeGateAttention,
    Rotary,
    SimpleGateLoop,
    TalkingHeadsAttention,
)
from attention_zoo.testing import Subject

DIM = 32
SMALL: dict[str, Any] = {"heads": 4, "dim_head": 8}
LENGTHS = (1, 2, 7, 64, 65, 131)
FEWER = (1, 7, 67)  # for variants that share their loops with a case that runs all lengths


@dataclass(frozen=True)
class Case:
    """A small block and what the contract kit must know of it.

    Args:
        name: the block's name in BLOCKS, and after a colon the variant.
        make: builds it for features of size DIM.
        causal: whether it hides the future.
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
    """A context of 11 tokens with holes, each row with at least one token to read."""
    mask = torch.rand(batch, 11) < 0.6
    mask[:, 3] = True
    return {"context": torch.randn(batch, 11, 24), "context_mask": mask}


def striped() -> Tensor:
    """Every token sees itself and every third one."""
    index = torch.arange(131)
    return (index[:, None] - index) % 3 == 0


CASES = [
    Case("full", lambda: FullAttention(DIM, **SMALL), lengths=LENGTHS),
    Case("full: bidirectional", lambda: FullAttention(DIM, causal=False, **SMALL), causal=False),
    Case("full: grouped heads, rotary", lambda: FullAttention(DIM, kv_heads=2, rotary=Rotary(), **SMALL)),
    Case("full: relative bias", lambda: FullAttention(DIM, bias=RelativeBias(4), **SMALL), lengths=(1, 7, 67, 131)),
    Case(
        "full: bidirectional, relative bias, biased projections",
        lambda: FullAttention(
            DIM, causal=False, bias=RelativeBias(4, causal=False), qkv_bias=True, out_bias=True, **SMALL
        ),
        causal=False,
    ),
    Case(
        "full: pattern",
        lambda: FullAttention(DIM, pattern=striped(), **SMALL),
        options={"shift_invariant": False},  # the pattern is tied to the index
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
        "cosine_sim: bidirectional, bias",
        lambda: CosineSimAttention(DIM, causal=False, bias=RelativeBias(4, causal=False), **SMALL),
        causal=False,
    ),
    Case("talking_heads", lambda: TalkingHeadsAttention(DIM, **SMALL), lengths=LENGTHS),
    Case("talking_heads: mlp", lambda: TalkingHeadsAttention(DIM, pre="mlp", post="mlp", **SMALL)),
    Case("talking_heads: pre only", lambda: TalkingHeadsAttention(DIM, post=None, **SMALL)),
    Case("talking_heads: post only", lambda: TalkingHeadsAttention(DIM, pre=None, **SMALL)),
    Case("talking_heads: none", lambda: TalkingHeadsAttention(DIM, pre=None, post=None, **SMALL)),
    Case(
        "talking_heads: 2 streams, bidirectional",
        lambda: TalkingHeadsAttention(DIM, streams=2, causal=False, post="mlp", **SMALL),
        causal=False,
        options={"streams": 2},
    ),
    Case(
        "talking_heads: 3 streams",
        lambda: TalkingHeadsAttention(DIM, streams=3, **SMALL),
        options={"streams": 3},
    ),
    Case("gate_loop", lambda: GateLoopAttention(DIM), options={"gradient_is_exact": False}),
    Case("gate_loop: exact gradients", lambda: GateLoopAttention(DIM, gradient_fraction=1.0), lengths=LENGTHS),
    Case("gate_loop: 4 heads", lambda: GateLoopAttention(DIM, heads=4, gradient_fraction=1.0), lengths=LENGTHS),
    Case(
        "gate_loop: inner features, sub-norm",
        lambda: GateLoopAttention(DIM, heads=4, dim_inner=48, sub_norm=True, gradient_fraction=1.0),
        options={"empty_is_zero": True},  # the sub-norm's bias waits for the first real token
    ),
    Case(
        "gate_loop: real gate, no swish",
        lambda: GateLoopAttention(DIM, heads=8, real_gate=True, swish_gate=False, gradient_fraction=1.0),
        options={"bf16_error": 0.1},  # the gate jumps from -1/2 to 1/2 where z changes its sign, as rounding may
    ),
    Case("gate_loop: no transition", lambda: GateLoopAttention(DIM, heads=4, transition=False)),
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
            DIM, softmax=False, rotary=Rotary(), out_bias=True, swish_gate=False, gradient_fraction=1.0, **SMALL
        ),
    ),
]
