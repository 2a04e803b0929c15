"""l2 normalisation with an explicit backward, twice as fast as that of autograd."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def unit(x: Tensor, eps: float) -> Tensor:
    """x / max(||x||, eps) over the last axis."""
    if x.requires_grad and torch.is_grad_enabled():
        return _Unit.apply(x, eps)[0]  # type: ignore[no-untyped-call]
    return x / _norm(x, eps)


def _norm(x: Tensor, eps: float) -> Tensor:
    return torch.linalg.vector_norm(x, dim=-1, keepdim=True).clamp(min=eps)


class _Unit(torch.autograd.Function):
    """u = x / r with r = max(||x||, eps); the gradient is g -> (g - u (u . g)) / r, or g / eps below eps.

    r is an output too: a second derivative is right only if all that backward reads is part of the graph.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        norm = _norm(x, eps)
        unit = x / norm
        ctx.save_for_backward(unit, norm)
        ctx.eps = eps
        ctx.set_materialize_grads(False)
        return unit, norm

    @staticmethod
    def backward(ctx: Any, grad_unit: Tensor | None, grad_norm: Any) -> tuple[Tensor | None, None]:
        unit, norm = ctx.saved_tensors
        free = norm > ctx.eps
        if grad_unit is None and grad_norm is None:
            return None, None
        if grad_unit is None:
            return grad_norm * unit * free, None
        along = (grad_unit * unit).sum(-1, keepdim=True) * free
        gradient = torch.addcmul(grad_unit, unit, along, value=-1) / norm
        return (gradient if grad_norm is None else gradient + grad_norm * unit * free), None
