"""Layers with patterns and biases on a device: a number of operators that does not grow, and no synchronisation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from attention_zoo import (
    AxialAttention,
    BlockSparseAttention,
    ConvAttention,
    FullAttention,
    RelativeBias,
    TextImageLayout,
)
from tests.counting import check_no_synchronisation, count_operators

DIM = 16
SIZES: dict[str, Any] = {"heads": 2, "dim_head": 8}


def image(size: int) -> TextImageLayout:
    return TextImageLayout(size, size, size)


LAYERS: dict[str, Callable[[int], nn.Module]] = {
    "conv": lambda size: ConvAttention(DIM, layout=image(size), **SIZES),
    "conv: wrapped": lambda size: ConvAttention(DIM, layout=image(size), window="wrapped", **SIZES),
    "conv: bidirectional": lambda size: ConvAttention(DIM, layout=image(size), causal=False, **SIZES),
    "axial_row": lambda size: AxialAttention(DIM, layout=image(size), **SIZES),
    "axial_row: wrapped": lambda size: AxialAttention(DIM, layout=image(size), axis="wrapped_row", **SIZES),
    "axial_col": lambda size: AxialAttention(DIM, layout=image(size), axis="column", **SIZES),
    "axial_col: bidirectional": lambda size: AxialAttention(
        DIM, layout=image(size), axis="column", causal=False, **SIZES
    ),
    "block_sparse": lambda size: BlockSparseAttention(DIM, layout=image(size), block_size=size, **SIZES),
    "relative bias": lambda size: FullAttention(DIM, bias=RelativeBias(2), **SIZES),
    "pattern": lambda size: FullAttention(
        DIM, pattern=torch.ones(size + size**2, size + size**2, dtype=torch.bool), **SIZES
    ),
}


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("padded", [False, True])
def test_training_takes_as_many_operators_at_any_length_and_no_synchronisation(name: str, padded: bool) -> None:
    counts = set()
    for size in (16, 64):  # 272 and 4160 tokens
        with torch.device("meta"):
            layer = LAYERS[name](size)
            x = torch.randn(2, size + size**2, DIM, requires_grad=True)
            mask = torch.ones(2, size + size**2, dtype=torch.bool) if padded else None

        def train() -> None:
            out = layer(x, mask=mask)  # noqa: B023
            out.backward(torch.zeros_like(out))

        check_no_synchronisation(train)
        counts.add(count_operators(train))
    assert len(counts) == 1
    assert counts.pop() < 120


@pytest.mark.parametrize("name", [name for name in LAYERS if "bidirectional" not in name])
def test_decoding_takes_as_many_operators_at_any_length_and_no_synchronisation(name: str) -> None:
    counts = set()
    for size in (16, 64):
        with torch.device("meta"), torch.no_grad():
            layer = LAYERS[name](size).eval()
            _, state = layer.step(torch.randn(1, size + size**2 - 2, DIM))
            token = torch.randn(1, 1, DIM)

        def step() -> None:
            with torch.no_grad():
                layer.step(token, state)  # noqa: B023

        check_no_synchronisation(step)
        counts.add(count_operators(step))
    assert len(counts) == 1
