"""Complex, data-dependent gates.

Paper: GateLoop, https://arxiv.org/abs/2311.01927
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from attention_zoo.ops.precision import at_least_float32, no_autocast

SMALLEST = 1e-300  # the smallest magnitude under the logarithm; a product with it is 0 in float32
LOG_OF_ZERO = -2000.0  # its exponential is 0 in float64 too, and sums of a few keep their precision


def unit_gate(z: Tensor) -> Tensor:
    """The gate sigma(|z|) e^{i arg z}, without trigonometric functions; 0.5 at z = 0, where the gradient is 0.

    Args:
        z: (..., 2) floating point, real and imaginary part.

    Returns:
        (...) complex, in at least complex64.
    """
    with no_autocast(z):
        re, im = at_least_float32(z).unbind(-1)  # separate tensors: operators are slow along an axis of size 2
        square = re * re + im * im
        zero = square == 0
        size = torch.where(zero, 1.0, square).sqrt()
        scale = torch.where(zero, 0.0, size.sigmoid() / size)
        return torch.complex(re * scale + 0.5 * zero, im * scale)


def unit_gate_gradient(z: Tensor, grad_gate: Tensor) -> Tensor:
    """Gradient (..., 2) of z from that of `unit_gate(z)`, (...) complex: sigma' along z, sigma / |z| across it."""
    re, im = z.unbind(-1)
    square = re * re + im * im
    inverse = torch.where(square == 0, 0.0, square.rsqrt())
    sigma = square.sqrt().sigmoid()
    unit_re, unit_im, grad_re, grad_im = re * inverse, im * inverse, grad_gate.real, grad_gate.imag
    along = grad_re * unit_re + grad_im * unit_im
    across = sigma * inverse
    slope = sigma * (1 - sigma) * along - across * along
    return torch.stack((across * grad_re + slope * unit_re, across * grad_im + slope * unit_im), dim=-1)


def log_and_phase(gate: Tensor) -> tuple[Tensor, Tensor]:
    """Log-magnitude and phase (...) of gates (..., 2), in float64. Gates of 0 get LOG_OF_ZERO, 0 and no gradient.

    float64, because cumulative sums of logarithms of small gates reach values whose differences float32 would round.
    """
    re, im = (part.double() for part in gate.unbind(-1))  # separate tensors, see `unit_gate`
    zero = (re == 0) & (im == 0)
    re = re.masked_fill(zero, 1.0)
    log = torch.hypot(re, im).clamp(min=SMALLEST).log().masked_fill(zero, LOG_OF_ZERO)
    return log, torch.atan2(im, re)


def size_and_direction(gate: Tensor) -> tuple[Tensor, Tensor]:
    """|a| and a / |a|, (...), of gates (..., 2), in their own precision. Gates of 0 have the direction 1.

    Products of these need no float64, which not every device has: their relative error does not grow with the number
    of small gates, as that of sums of logarithms does.
    """
    re, im = gate.unbind(-1)
    size = torch.hypot(re, im)
    zero = size == 0
    scale = torch.where(zero, 1.0, size)
    return size, torch.complex(torch.where(zero, 1.0, re) / scale, im / scale)


def gate_products(gate: Tensor) -> Tensor:
    """a_{j+1} ... a_i, (..., i, j), of gates (..., n); 0 for j > i. Without division, so that gates of 0 are exact."""
    n = gate.shape[-1]
    later = torch.ones(n, n, dtype=torch.bool, device=gate.device).tril(-1)
    return torch.where(later, gate[..., :, None], 1.0).cumprod(-2).tril()


def products_up_to(gate: Tensor) -> Tensor:
    """a_1 ... a_t along axis 2, in a logarithmic number of products, so that gradients need no division."""
    shift = 1
    while shift < gate.shape[2]:
        gate = torch.cat((gate[:, :, :shift], gate[:, :, shift:] * gate[:, :, :-shift]), dim=2)
        shift *= 2
    return gate


def magnitude(log: Tensor, dtype: torch.dtype) -> Tensor:
    """exp(log) of a cumulative log-magnitude, through `flush_denormal_`; 1 for log > 0, of keys after their query."""
    least = math.log(torch.finfo(dtype).tiny) / 2 - 1
    return flush_denormal_(log.to(dtype).clamp(least, 0.0).exp_())


def flush_denormal_(decay: Tensor) -> Tensor:
    """Set decays to 0, in place, where the product of two such values would be denormal.

    Denormal numbers slow matrix products and exp down tenfold; the values set to 0 are far below the rounding error of
    the sums that they enter.
    """
    return F.threshold(decay, torch.finfo(decay.dtype).tiny ** 0.5, 0.0, inplace=True)


def complex_of(dtype: torch.dtype) -> torch.dtype:
    """Complex dtype of the gates for features of `dtype`: complex128 for float64, otherwise complex64."""
    return torch.complex128 if dtype == torch.float64 else torch.complex64


def scale_gradient(x: Tensor, fraction: float) -> Tensor:
    """Identity whose gradient is scaled: fraction * x + (1 - fraction) * stop_gradient(x)."""
    if fraction == 1.0 or not torch.is_grad_enabled():
        return x
    return _ScaleGradient.apply(x, fraction)  # type: ignore[no-untyped-call]


class _ScaleGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, fraction: float) -> Tensor:
        ctx.fraction = fraction
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad * ctx.fraction, None
