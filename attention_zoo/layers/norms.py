"""RMSNorm and LayerNorm, computed in at least float32 for any input dtype.

Papers: Layer Normalization, https://arxiv.org/abs/1607.06450; RMSNorm, https://arxiv.org/abs/1910.07467
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from attention_zoo._checks import check_choice, check_instance, check_int, check_positive_number
from attention_zoo.ops.precision import at_least_float32


class RMSNorm(nn.Module):
    """x * rsqrt(mean_d x^2 + eps) * weight.

    Args:
        dim: features d.
        eps: added to the mean square.
    """

    def __init__(self, dim: int, *, eps: float = 1e-5) -> None:
        super().__init__()
        check_int(1, dim=dim)
        check_positive_number(eps=eps)
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        """(..., d) -> (..., d) in the dtype of x."""
        wide = widen(x, self.weight)
        return F.rms_norm(wide, self.weight.shape, self.weight.to(wide.dtype), self.eps).to(x.dtype)

    def extra_repr(self) -> str:
        return f"{self.weight.shape[0]}, eps={self.eps}"


class LayerNorm(nn.Module):
    """(x - mean_d x) * rsqrt(var_d x + eps) * weight + bias.

    Args:
        dim: features d.
        eps: added to the variance.
    """

    def __init__(self, dim: int, *, eps: float = 1e-5) -> None:
        super().__init__()
        check_int(1, dim=dim)
        check_positive_number(eps=eps)
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))
        self.bias = nn.Parameter(torch.zeros(dim))

    def forward(self, x: Tensor) -> Tensor:
        """(..., d) -> (..., d) in the dtype of x."""
        wide = widen(x, self.weight)
        weight, bias = self.weight.to(wide.dtype), self.bias.to(wide.dtype)
        return F.layer_norm(wide, self.weight.shape, weight, bias, self.eps).to(x.dtype)

    def extra_repr(self) -> str:
        return f"{self.weight.shape[0]}, eps={self.eps}"


def widen(x: Tensor, weight: Tensor) -> Tensor:
    """The input of a norm, cast to at least float32 where torch's norm would not compute in it.

    On other devices than the CPU torch's norms accumulate in float32, and need no casts where features and weights
    have one dtype. On the CPU LayerNorm of half precision loses the variance of large features (torch 2.13).
    """
    return x if x.dtype == weight.dtype and x.device.type != "cpu" else at_least_float32(x)


NORMS: dict[str, Callable[[int], nn.Module]] = {"rms": RMSNorm, "layer": LayerNorm}


def make_norm(norm: str | Callable[[int], nn.Module], dim: int) -> nn.Module:
    """A norm by its name in NORMS, or made by a function of `dim`.

    Raises:
        TypeError: `norm` is neither a name nor a function, or the function returns no module.
        ValueError: `norm` is not in NORMS.
    """
    if callable(norm) and not isinstance(norm, nn.Module):
        made = norm(dim)
        check_instance(nn.Module, norm=made)
        return made
    check_instance(str, norm=norm)
    check_choice("norm", norm, NORMS)
    return NORMS[str(norm)](dim)
