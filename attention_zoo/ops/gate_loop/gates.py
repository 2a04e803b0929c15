"""Complex gates that the data sets.

Paper: GateLoop, https://arxiv.org/abs/2311.01927
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from attention_zoo.ops.precision import at_least_float32, no_autocast


def unit_gate(z: Tensor) -> Tensor:
    """sigma(|z|) e^{i arg z} without trigonometry; 0.5 at z = 0, where the gradient is 0.

    Args:
        z: (..., 2) floating, real and imaginary part.

    Returns:
        (...) complex, in at least complex64.
    """
    with no_autocast(z):
        re, im = at_least_float32(z).unbind(-1)  # apart: operators are slow along an axis of two
        square = re * re + im * im
        zero = square == 0
        size = torch.where(zero, 1.0, square).sqrt()
        scale = torch.where(zero, 0.0, size.sigmoid() / size)
        return torch.complex(re * scale + 0.5 * zero, im * scale)


def unit_gate_gradient(z: Tensor, to_gate: Tensor) -> Tensor:
    """The gradient (..., 2) of z for that of `unit_gate(z)`, (...) complex: sigma' along z, sigma / |z| across it."""
    re, im = z.unbind(-1)
    square = re * re + im * im
    inverse = torch.where(square == 0, 0.0, square.rsqrt())
    sigma = square.sqrt().sigmoid()
    u_re, u_im, to_re, to_im = re * inverse, im * inverse, to_gate.real, to_gate.imag
    along = to_re * u_re + to_im * u_im
    across = sigma * inverse
    slope = sigma * (1 - sigma) * along - across * along
    return torch.stack((across * to_re + slope * u_re, across * to_im + slope * u_im), dim=-1)


def magnitude(log: Tensor, dtype: torch.dtype) -> Tensor:
    """exp(log) of magnitudes multiplied up, and 0 where a product of two as small would be a denormal number.

    With denormal numbers matmul, and exp itself, take ten times as long; what is left out is far below the rounding of
    what it would be added to.
    """
    least = torch.finfo(dtype).tiny ** 0.5
    return F.threshold(log.to(dtype).clamp(min=math.log(least) - 1).exp_(), least, 0.0)


def complex_of(dtype: torch.dtype) -> torch.dtype:
    """The complex dtype in which gates of features of this dtype are computed."""
    return torch.complex128 if dtype == torch.float64 else torch.complex64


def scale_gradient(x: Tensor, fraction: float) -> Tensor:
    """x itself, which passes the part `fraction` of its gradient on: fraction * x + (1 - fraction) * stop(x)."""
    if fraction == 1.0 or not torch.is_grad_enabled():
        return x
    scaled: Tensor = _ScaleGradient.apply(x, fraction)  # type: ignore[no-untyped-call]
    return scaled


class _ScaleGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, fraction: float) -> Tensor:
        ctx.fraction = fraction
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad * ctx.fraction, None
