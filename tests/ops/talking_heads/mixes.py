"""Inputs and head mixes, shared by the tests of talking heads."""

from __future__ import annotations

import torch
from torch import Tensor

from attention_zoo.ops.talking_heads import HeadMix, HeadMLP

HEADS = 6


def inputs(i: int, j: int, dtype: torch.dtype = torch.float32, batch: int = 2) -> list[Tensor]:
    shapes = [(batch, HEADS, i, 8), (batch, HEADS, j, 8), (batch, HEADS, j, 5)]
    return [torch.randn(shape, dtype=dtype).requires_grad_() for shape in shapes]


def make_mix(
    kind: str | None, dtype: torch.dtype = torch.float32, heads: int = HEADS, after: int | None = None
) -> HeadMix:
    def weight(*shape: int) -> Tensor:
        return (torch.randn(shape) * heads**-0.5).to(dtype).requires_grad_()

    if kind is None:
        return None
    if kind == "linear":
        return weight(heads if after is None else after, heads)
    return HeadMLP(weight(heads), weight(2 * heads, heads), weight(heads, 2 * heads))


def tensors_of(*mixes: HeadMix) -> list[Tensor]:
    return [part for mix in mixes for part in ([] if mix is None else [mix] if isinstance(mix, Tensor) else mix)]
