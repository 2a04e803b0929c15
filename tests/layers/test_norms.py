"""RMSNorm and LayerNorm, computed in at least float32."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from attention_zoo import LayerNorm, RMSNorm
from attention_zoo.layers.norms import make_norm
from tests.counting import operators_of
from tests.formulas import relative_error

TOLERANCE = {torch.float16: 2e-3, torch.bfloat16: 1e-2, torch.float32: 1e-6, torch.float64: 1e-13}


def rms(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return x / torch.sqrt(x.square().mean(-1, keepdim=True) + 1e-5) * weight


def layer(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return centred / torch.sqrt(centred.square().mean(-1, keepdim=True) + 1e-5) * weight + bias


FORMULAS = {RMSNorm: rms, LayerNorm: layer}


def learned(kind: type[nn.Module], dim: int) -> nn.Module:
    """A norm whose weights have moved."""
    norm = kind(dim)
    for parameter in norm.parameters():
        nn.init.normal_(parameter)
    return norm


def wide_copies(inputs: list[Tensor]) -> list[Tensor]:
    return [leaf.detach().double().requires_grad_() for leaf in inputs]


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("kind", FORMULAS)
def test_output_and_gradients_equal_the_formula(kind: type[nn.Module], dtype: torch.dtype) -> None:
    norm = learned(kind, 13).to(dtype)
    x = (3 + torch.randn(2, 5, 13)).to(dtype).requires_grad_()
    inputs = [x, *norm.parameters()]
    wide = wide_copies(inputs)
    want = FORMULAS[kind](wide[0], wide[1], wide[2] if len(wide) == 3 else None)
    cotangent = torch.randn(x.shape).to(dtype)
    out = norm(x)
    assert out.dtype == dtype
    assert relative_error(out, want) < TOLERANCE[dtype]
    grads = torch.autograd.grad(out, inputs, cotangent)
    for grad, want_grad in zip(grads, torch.autograd.grad(want, wide, cotangent.double()), strict=True):
        assert relative_error(grad, want_grad) < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", FORMULAS)
def test_norms_round_half_precision_once_at_the_end(kind: type[nn.Module], dtype: torch.dtype) -> None:
    norm, x = learned(kind, 64), torch.randn(32, 64).to(dtype)  # weights of float32, as under mixed precision
    wide = [p.double() for p in norm.parameters()]
    want = FORMULAS[kind](x.double(), wide[0], wide[1] if len(wide) == 2 else None)
    out = norm(x)
    assert out.dtype == dtype
    # all but the few numbers that lie, to float32's precision, midway between two of the dtype
    assert (out == want.to(dtype)).double().mean() > 0.995


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("kind", FORMULAS)
@pytest.mark.parametrize("value", [0.0, 6e4])
def test_norms_of_constant_rows_are_finite(kind: type[nn.Module], dtype: torch.dtype, value: float) -> None:
    x = torch.full((1, 2, 16), value, dtype=dtype, requires_grad=True)
    out = kind(16).to(dtype)(x)
    out.float().sum().backward()
    want = 1.0 if kind is RMSNorm and value else 0.0
    torch.testing.assert_close(out.float(), torch.full((1, 2, 16), want), atol=1e-2, rtol=0)
    assert x.grad.isfinite().all()


@pytest.mark.parametrize("kind", FORMULAS)
def test_norms_keep_dtype_and_precision_under_autocast(kind: type[nn.Module]) -> None:
    norm, x = kind(16), torch.randn(2, 5, 16)
    want = norm(x)
    with torch.autocast("cpu", torch.bfloat16):
        got = norm(x)
    assert got.dtype == torch.float32
    assert torch.equal(got, want)


@pytest.mark.parametrize("kind", FORMULAS)
def test_norms_are_twice_differentiable(kind: type[nn.Module]) -> None:
    norm = kind(5).double()
    assert torch.autograd.gradgradcheck(norm, torch.randn(2, 3, 5, dtype=torch.float64, requires_grad=True))


def test_make_norm_takes_a_name_or_a_function() -> None:
    assert isinstance(make_norm("rms", 8), RMSNorm)
    assert isinstance(make_norm("layer", 8), LayerNorm)
    assert isinstance(make_norm(nn.Identity, 8), nn.Identity)
    assert make_norm(("layer", {"eps": 0.1}), 8).eps == make_norm(["layer", {"eps": 0.1}], 8).eps == 0.1


def test_make_norm_rejects_an_unknown_name_and_suggests_the_nearest() -> None:
    with pytest.raises(ValueError, match=r"norm must be one of \['rms', 'layer'\], got norm='layers'.*mean 'layer'"):
        make_norm("layers", 8)


@pytest.mark.parametrize("kind", FORMULAS)
def test_norms_reject_zero_features(kind: type[nn.Module]) -> None:
    with pytest.raises(ValueError, match="dim must be at least 1, got dim=0"):
        kind(0)


@pytest.mark.parametrize(("kind", "function"), [(RMSNorm, F.rms_norm), (LayerNorm, F.layer_norm)])
def test_a_norm_on_a_device_adds_no_casts_to_the_norm_of_torch(kind: type[nn.Module], function: Any) -> None:
    norm = kind(16).to("meta", torch.bfloat16)
    x = torch.empty(1, 2, 16, device="meta", dtype=torch.bfloat16)
    assert operators_of(lambda: norm(x)) == operators_of(lambda: function(x, (16,), *norm.parameters(), eps=norm.eps))
