"""Feedforward layers against their formulas."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from attention_zoo import GEGLU, FeedForward, SwiGLU


def gelu(x: Tensor) -> Tensor:
    return x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))


def silu(x: Tensor) -> Tensor:
    return x / (1 + (-x).exp())


@pytest.mark.parametrize(("make", "activation"), [(FeedForward, gelu), (GEGLU, gelu), (SwiGLU, silu)])
@pytest.mark.parametrize("bias", [True, False])
def test_a_feedforward_computes_its_formula(make, activation, bias: bool) -> None:
    layer = make(6, mult=3, bias=bias).double()
    x = torch.randn(2, 5, 6, dtype=torch.float64)
    hidden = layer.to_hidden(x)
    hidden = hidden * activation(layer.to_gate(x)) if make is not FeedForward else activation(hidden)
    torch.testing.assert_close(layer(x), layer.to_out(hidden), rtol=1e-12, atol=1e-12)
    assert hidden.shape[-1] == 18
    assert (layer.to_out.bias is not None) == bias


def test_dropout_drops_hidden_features_in_training_alone() -> None:
    layer, x = FeedForward(8, dropout=0.5), torch.randn(1, 3, 8)
    assert not torch.equal(layer(x), layer(x))
    layer.eval()
    assert torch.equal(layer(x), layer(x))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dropout": 1.0}, r"dropout must lie in \[0, 1\), got dropout=1.0"),
        ({"mult": 0}, "mult must give at least one hidden feature, got mult=0 with dim=8"),
        ({"mult": -2}, "mult must give at least one hidden feature, got mult=-2"),
    ],
)
def test_sizes_that_make_no_layer_are_refused(options, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FeedForward(8, **options)
