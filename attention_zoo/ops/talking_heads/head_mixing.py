"""Fast head mixing: maps (h, i, j) are mixed into workspace buffers, with an explicit backward.

A mix is given as the list of its tensors, as operators take it: none (no mix), the matrix, or the three of a `HeadMLP`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

EPS = 1e-5  # of the RMS norm in a `HeadMLP`


def mix_into(maps: Tensor, mix: Sequence[Tensor], buffer: Tensor) -> Tensor:
    """Mix maps (h, i, j).

    Args:
        maps: the maps, not modified.
        mix: tensors of the mix.
        buffer: (h, i, j), overwritten with the result of a linear mix.

    Returns:
        `buffer`, a new tensor (`HeadMLP`), or `maps` itself (no mix).
    """
    if not mix:
        return maps
    x = maps.flatten(1)  # (h, i j): one matrix product for all pairs of query and key
    if len(mix) == 1:
        torch.mm(mix[0].to(maps.dtype), x, out=buffer.view(x.shape))
        return buffer
    norm, w1, w2 = (part.to(maps.dtype) for part in mix)
    unit = x * torch.rsqrt(x.square().mean(dim=0, keepdim=True) + EPS)
    return (x + w2 @ F.gelu(w1 @ (unit * norm[:, None]))).view_as(maps)


def mix_backward(maps: Tensor, mix: Sequence[Tensor], gradient: Tensor, buffer: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Gradients of mixing maps (h, i, j).

    Args:
        maps, mix: as in `mix_into`.
        gradient: (h, i, j), gradient of the mixed maps.
        buffer: (h, i, j), overwritten with the gradient of the maps of a linear mix.

    Returns:
        Gradient of the maps (`buffer`, a new tensor, or `gradient` itself) and gradients of the tensors of the mix.
    """
    if not mix:
        return gradient, []
    x, g = maps.flatten(1), gradient.flatten(1)
    if len(mix) == 1:
        torch.mm(mix[0].to(x.dtype).t(), g, out=buffer.view(x.shape))
        return buffer, [g @ x.t()]
    norm, w1, w2 = (part.to(x.dtype) for part in mix)
    scale = torch.rsqrt(x.square().mean(dim=0, keepdim=True) + EPS)
    unit = x * scale
    hidden = w1 @ (unit * norm[:, None])
    grad_hidden = torch.ops.aten.gelu_backward(w2.t() @ g, hidden)
    grad_normed = w1.t() @ grad_hidden
    grad_unit = grad_normed * norm[:, None]
    grad_maps = g + scale * (grad_unit - unit * (grad_unit * unit).mean(dim=0, keepdim=True))
    parts = [(grad_normed * unit).sum(1), grad_hidden @ (unit * norm[:, None]).t(), g @ F.gelu(hidden).t()]
    return grad_maps.view_as(maps), parts
