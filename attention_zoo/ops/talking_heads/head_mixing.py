"""Fast head mixing: maps (h, r, i, j) are mixed into workspace buffers, with an explicit backward.

A mix is given as the list of its tensors, as operators take it: none (no mix), the matrix, or the three of a `HeadMLP`.
The heads come first, so that mixing all maps of all batch rows r is one matrix product.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

EPS = 1e-5  # of the RMS norm in a `HeadMLP`


def in_buffer(buffer: Tensor, *shape: int) -> Tensor:
    """The first numbers of a flat buffer as a tensor of the given shape."""
    return buffer[: math.prod(shape)].view(shape)


def mix_into(maps: Tensor, mix: Sequence[Tensor], buffer: Tensor) -> Tensor:
    """Mix maps.

    Args:
        maps: (h, r, i, j), not modified.
        mix: tensors of the mix, of h maps into o.
        buffer: flat, overwritten with the result of a linear mix.

    Returns:
        (o, r, i, j): `buffer`, a new tensor (`HeadMLP`), or `maps` itself (no mix).
    """
    if not mix:
        return maps
    x = maps.flatten(1)  # (h, r i j): one matrix product for all pairs of query and key
    if len(mix) == 1:
        mixed = in_buffer(buffer, mix[0].shape[0], *maps.shape[1:])
        torch.mm(mix[0].to(maps.dtype), x, out=mixed.view(mixed.shape[0], x.shape[1]))
        return mixed
    norm, w1, w2 = (part.to(maps.dtype) for part in mix)
    unit = x * torch.rsqrt(x.square().mean(dim=0, keepdim=True) + EPS)
    return (x + w2 @ F.gelu(w1 @ (unit * norm[:, None]))).view_as(maps)


def mix_backward(maps: Tensor, mix: Sequence[Tensor], gradient: Tensor, buffer: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Gradients of mixing maps.

    Args:
        maps, mix: as in `mix_into`.
        gradient: (o, r, i, j), gradient of the mixed maps.
        buffer: flat, overwritten with the gradient of the maps of a linear mix.

    Returns:
        Gradient of the maps (`buffer`, a new tensor, or `gradient` itself) and gradients of the tensors of the mix.
    """
    if not mix:
        return gradient, []
    x, g = maps.flatten(1), gradient.flatten(1)
    if len(mix) == 1:
        grad_maps = in_buffer(buffer, *maps.shape)
        torch.mm(mix[0].to(x.dtype).t(), g, out=grad_maps.view(x.shape))
        return grad_maps, [g @ x.t()]
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
