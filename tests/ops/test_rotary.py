"""Rotary position embedding."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from attention_zoo.ops import rotate
from tests.formulas import relative_error


def table(angle: Tensor) -> tuple[Tensor, Tensor]:
    """cos and sin of (n, r / 2) angles in the layout of `rotate`."""
    sign = torch.tensor([-1.0, 1.0]).repeat(angle.shape[-1])
    return angle.cos().repeat_interleave(2, -1), angle.sin().repeat_interleave(2, -1) * sign


def rotate_complex(x: Tensor, angle: Tensor) -> Tensor:
    width = 2 * angle.shape[-1]
    pairs = torch.complex(x[..., 0:width:2].double(), x[..., 1:width:2].double())
    rotated = torch.view_as_real(pairs * torch.polar(torch.ones_like(angle), angle).to(pairs.dtype)).flatten(-2)
    return torch.cat((rotated, x[..., width:].double()), dim=-1)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize(("features", "pairs"), [(8, 4), (11, 4), (7, 3), (2, 1)])
def test_rotation_multiplies_pairs_as_complex_numbers_and_keeps_the_other_features(
    dtype: torch.dtype, features: int, pairs: int
) -> None:
    x = torch.randn(2, 3, 5, features).to(dtype).requires_grad_()
    angle = 100 * torch.randn(5, pairs)
    out, want = rotate(x, *table(angle)), rotate_complex(x, angle)
    cotangent = torch.randn(out.shape)
    (grad,) = torch.autograd.grad(out, x, cotangent.to(dtype))
    (want_grad,) = torch.autograd.grad(want, x, cotangent.to(dtype).double())
    tolerance = {torch.float16: 1e-3, torch.bfloat16: 4e-3}.get(dtype, 1e-6)
    assert out.dtype == dtype
    assert torch.equal(out[..., 2 * pairs :], x[..., 2 * pairs :])
    assert relative_error(out, want) < tolerance
    assert relative_error(grad, want_grad) < tolerance


def test_inputs_may_be_non_contiguous_and_are_not_modified() -> None:
    x = torch.randn(2, 5, 3, 8).transpose(1, 2)
    before, angle = x.clone(), torch.randn(5, 4)
    assert relative_error(rotate(x, *table(angle)), rotate_complex(before, angle)) < 1e-6
    assert torch.equal(x, before)


def test_autocast_does_not_change_the_rotation() -> None:
    x, angle = torch.randn(1, 2, 5, 8), torch.randn(5, 4)
    want = rotate(x, *table(angle))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(rotate(x, *table(angle)), want)


def halves(x: Tensor) -> Tensor:
    """Interleaved pairs (..., r) in the order of pairing="half"."""
    return torch.cat((x[..., 0::2], x[..., 1::2]), dim=-1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize(("features", "pairs"), [(8, 4), (11, 4), (2, 1)])
def test_pairs_of_both_halves_are_rotated_as_interleaved_pairs(dtype: torch.dtype, features: int, pairs: int) -> None:
    x, angle, width = torch.randn(2, 3, 5, features).to(dtype), 100 * torch.randn(5, pairs), 2 * pairs
    want = rotate_complex(x, angle)
    want = torch.cat((halves(want[..., :width]), want[..., width:]), dim=-1)
    permuted = torch.cat((halves(x[..., :width]), x[..., width:]), dim=-1).requires_grad_()
    out = rotate(permuted, *(halves(part) for part in table(angle)), pairing="half")
    assert out.dtype == dtype
    assert relative_error(out, want) < (4e-3 if dtype == torch.bfloat16 else 1e-6)
    (grad,) = torch.autograd.grad(out, permuted, want.to(dtype))  # rotates back
    assert relative_error(grad, permuted) < (8e-3 if dtype == torch.bfloat16 else 1e-6)


def test_unknown_pairing_is_refused() -> None:
    with pytest.raises(ValueError, match=r"pairing must be one of .* got pairing='split'"):
        rotate(torch.randn(1, 2, 4), torch.ones(2, 4), torch.ones(2, 4), pairing="split")


def test_rotation_compiles_as_one_graph() -> None:
    x, (cos, sin) = torch.randn(1, 2, 5, 8, requires_grad=True), table(torch.randn(5, 3))
    got, want = torch.compile(rotate, fullgraph=True, backend="aot_eager")(x, cos, sin), rotate(x, cos, sin)
    torch.testing.assert_close(got, want)
    cotangent = torch.randn_like(want)
    torch.testing.assert_close(torch.autograd.grad(got, x, cotangent), torch.autograd.grad(want, x, cotangent))


def test_rotation_is_twice_differentiable() -> None:
    x = torch.randn(1, 2, 3, 6, dtype=torch.float64, requires_grad=True)
    cos, sin = table(torch.randn(3, 2))
    for pairing in ("interleaved", "half"):
        assert torch.autograd.gradcheck(lambda x, pairing=pairing: rotate(x, cos, sin, pairing=pairing), x)
        assert torch.autograd.gradgradcheck(lambda x, pairing=pairing: rotate(x, cos, sin, pairing=pairing), x)
