"""RMSNorm and LayerNorm, computed in at least float32 for any input dtype.

Papers: Layer Normalization, https://arxiv.org/abs/1607.06450; RMSNorm, https://arxiv.org/abs/1910.07467
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from inspect import signature
from typing import Any

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
        wide = at_least_float32(x)  # autocast does not cast norms
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
        wide = at_least_float32(x)  # autocast does not cast norms
        weight, bias = self.weight.to(wide.dtype), self.bias.to(wide.dtype)
        return F.layer_norm(wide, self.weight.shape, weight, bias, self.eps).to(x.dtype)

    def extra_repr(self) -> str:
        return f"{self.weight.shape[0]}, eps={self.eps}"


NORMS: dict[str, Callable[..., nn.Module]] = {"rms": RMSNorm, "layer": LayerNorm}


def make_norm(norm: str | tuple[str, Mapping[str, Any]] | Callable[[int], nn.Module], dim: int) -> nn.Module:
    """A norm by its name in NORMS, `(name, options)` such as ("rms", {"eps": 1e-6}), or made by a function of `dim`.

    Raises:
        TypeError: `norm` is none of these, or the function returns no module.
        ValueError: the name is not in NORMS, or an option is unknown.
    """
    if callable(norm) and not isinstance(norm, nn.Module):
        made = norm(dim)
        check_instance(nn.Module, norm=made)
        return made
    name, options = norm if isinstance(norm, (tuple, list)) and len(norm) == 2 else (norm, {})
    check_instance(str, norm=name)
    check_instance(Mapping, options_of_norm=options)
    check_choice("norm", name, NORMS)
    for option in options:
        check_choice(f"option of {name!r}", option, sorted({*signature(NORMS[name]).parameters} - {"dim"}))
    return NORMS[name](dim, **options)
