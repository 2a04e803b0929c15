"""Norms are computed in float32 at least, whatever the input's dtype."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from attention_zoo import LayerNorm, RMSNorm
from attention_zoo.layers.norms import make_norm


def test_rms_norm_is_the_input_over_its_root_mean_square_times_the_weight() -> None:
    norm, x = RMSNorm(7).double(), torch.randn(3, 5, 7, dtype=torch.float64)
    with torch.no_grad():
        norm.weight.uniform_(0.5, 2)
    want = x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * norm.weight
    torch.testing.assert_close(norm(x), want, rtol=1e-12, atol=1e-12)


def test_layer_norm_subtracts_the_mean_and_divides_by_the_deviation() -> None:
    norm, x = LayerNorm(7).double(), torch.randn(3, 7, dtype=torch.float64)
    with torch.no_grad():
        norm.bias.uniform_(-1, 1)
    want = (x - x.mean(-1, keepdim=True)) / (x.var(-1, correction=0, keepdim=True) + 1e-5).sqrt() + norm.bias
    torch.testing.assert_close(norm(x), want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("make", [RMSNorm, LayerNorm])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_normalised_in_float32_and_returned_in_its_own_dtype(
    make: type[nn.Module], dtype: torch.dtype
) -> None:
    x = (torch.randn(4, 64) * 3000).to(dtype)  # squares that float16 cannot hold
    out = make(64).to(dtype)(x)
    assert out.dtype == dtype
    torch.testing.assert_close(out, make(64)(x.float()).to(dtype), rtol=0, atol=0)


@pytest.mark.parametrize("make", [RMSNorm, LayerNorm])
def test_under_autocast_a_norm_stays_in_float32(make: type[nn.Module]) -> None:
    x = torch.randn(4, 64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = make(64)(x)
    assert out.dtype == torch.float32
    assert torch.equal(out, make(64)(x))


@pytest.mark.parametrize("make", [RMSNorm, LayerNorm])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_a_zero_row_gives_zeros_and_a_finite_gradient(make: type[nn.Module], dtype: torch.dtype) -> None:
    x = torch.zeros(2, 8, dtype=dtype, requires_grad=True)
    out = make(8).to(dtype)(x)
    out.sum().backward()
    assert not out.any()
    assert x.grad is not None
    assert x.grad.isfinite().all()


def test_an_unknown_norm_is_refused_with_the_nearest_known_one() -> None:
    with pytest.raises(ValueError, match=r"norm must be one of .*got norm='layers'; did you mean 'layer'"):
        make_norm("layers", 8)


def test_a_norm_of_no_features_is_refused() -> None:
    with pytest.raises(ValueError, match="dim must be at least 1, got dim=0"):
        RMSNorm(0)
