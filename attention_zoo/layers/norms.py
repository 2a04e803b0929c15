"""RMSNorm, LayerNorm and norms of queries and keys, computed in at least float32 for any input dtype.

Papers: Layer Normalization, https://arxiv.org/abs/1607.06450; RMSNorm, https://arxiv.org/abs/1910.07467; Query-Key
    Normalization for Transformers, https://arxiv.org/abs/2010.04245; Qwen3, https://arxiv.org/abs/2505.09388
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from attention_zoo._checks import check_choice, check_instance, check_int, check_number, check_positive_number
from attention_zoo.ops.cosine_sim import l2_normalize
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


class L2Norm(nn.Module):
    """x / max(||x||, eps) * scale for the features of a head; `scale` is a constant, or learned with one per head.

    Args:
        heads: number of heads with a learned scale, the parameter `weight`. None: the scale is a constant.
        scale: the scale, or its initial value.
        eps: smallest norm to divide by.
    """

    def __init__(self, heads: int | None, *, scale: float, eps: float) -> None:
        super().__init__()
        self.scale = scale
        self.eps = eps
        self.weight = None if heads is None else nn.Parameter(torch.full((heads,), float(scale)))

    def forward(self, x: Tensor) -> Tensor:
        """(..., h, n, e) -> (..., h, n, e) in the dtype of x."""
        wide = at_least_float32(x)
        scale = self.scale if self.weight is None else self.weight.to(wide.dtype)[:, None, None]
        # 1 / eps, the largest gradient of a zero vector, stays finite in the dtype of x
        return (l2_normalize(wide, eps=max(self.eps, torch.finfo(x.dtype).tiny)) * scale).to(x.dtype)

    def extra_repr(self) -> str:
        return f"scale={self.scale}, learned={self.weight is not None}, eps={self.eps}"


QK_NORMS = ("rms", "l2")


def make_qk_norms(
    kind: str | None, *, heads: int, dim_head: int, scale: float | None, eps: float
) -> tuple[nn.Module, nn.Module] | tuple[None, None]:
    """The norms of queries and of keys (..., h, n, e) before positions, for scores e^-0.5 q_i k_j.

    Args:
        kind: "rms", a learned weight for the features of all query heads, and one for those of all key heads, as in
            Qwen3; "l2", scores g q^_i k^_j of l2-normalised queries and keys with one learned g per query head; or
            None.
        heads: number h of query heads.
        dim_head: features e of a head.
        scale: initial value of g. Default: e^0.5, with which both kinds give the same scores at first.
        eps: added to the mean square ("rms"), or the smallest norm to divide by ("l2").

    Raises:
        TypeError: `kind` is not a string, or `eps` not a number.
        ValueError: `kind` is unknown, or `eps` is not positive.
    """
    check_instance(str, type(None), qk_norm=kind)
    check_number(qk_norm_eps=eps)
    check_positive_number(qk_norm_eps=eps)
    if kind is None:
        return None, None
    check_choice("qk_norm", kind, QK_NORMS)
    if kind == "rms":
        return RMSNorm(dim_head, eps=eps), RMSNorm(dim_head, eps=eps)
    root = dim_head**0.5  # cancels the e^-0.5 of the scores
    return L2Norm(heads, scale=root if scale is None else scale, eps=eps), L2Norm(None, scale=root, eps=eps)
