"""Mixes of head maps: at every pair of query and key the maps of all heads are combined.

Paper: Talking-Heads Attention, https://arxiv.org/abs/2003.02436
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F


class HeadMLP(NamedTuple):
    """A non-linear mix of C head maps, at every pair of query and key: x + w2 gelu(w1 (x / rms_c(x) * norm)).

    norm: (C,), w1: (2 C, C), w2: (C, 2 C).
    """

    norm: Tensor
    w1: Tensor
    w2: Tensor


HeadMix = Tensor | HeadMLP | None


def mix_heads(maps: Tensor, mix: HeadMix) -> Tensor:
    """Mix the head maps (b, C, i, j): out_o = sum_c mix[o, c] maps_c, or `HeadMLP`'s formula; None leaves them."""
    if mix is None:
        return maps
    flat = maps.flatten(2)  # (b, C, i j): one small matrix product for all pairs
    if isinstance(mix, HeadMLP):
        norm, w1, w2 = (part.to(maps.dtype) for part in mix)
        unit = flat * torch.rsqrt(flat.square().mean(dim=1, keepdim=True) + 1e-5)
        mixed = flat + w2 @ F.gelu(w1 @ (unit * norm[:, None]))
    else:
        mixed = mix.to(maps.dtype) @ flat
    return mixed.view_as(maps)


def parts_of(mix: HeadMix) -> list[Tensor]:
    """A mix as a list of tensors, which a custom op can take: none, one or three."""
    return [] if mix is None else [mix] if isinstance(mix, Tensor) else list(mix)


def whole_mix(parts: Sequence[Tensor]) -> HeadMix:
    return None if not parts else parts[0] if len(parts) == 1 else HeadMLP(*parts)


def mix_backward(maps: Tensor, mix: HeadMix, gradient: Tensor, room: Tensor) -> tuple[Tensor, list[Tensor]]:
    """The gradients of mixing maps (C, i, j) to the maps, written to `room` where that helps, and to the mix."""
    if mix is None:
        return gradient, []
    x, g = maps.flatten(1), gradient.flatten(1)
    if not isinstance(mix, HeadMLP):
        torch.mm(mix.to(x.dtype).t(), g, out=room.view(x.shape))
        return room, [g @ x.t()]
    norm, w1, w2 = (part.to(x.dtype) for part in mix)
    scale = torch.rsqrt(x.square().mean(dim=0, keepdim=True) + 1e-5)
    unit = x * scale
    hidden = w1 @ (unit * norm[:, None])
    to_hidden = torch.ops.aten.gelu_backward(w2.t() @ g, hidden)
    to_normed = w1.t() @ to_hidden
    to_unit = to_normed * norm[:, None]
    to_maps = g + scale * (to_unit - unit * (to_unit * unit).mean(dim=0, keepdim=True))
    parts = [(to_normed * unit).sum(1), to_hidden @ (unit * norm[:, None]).t(), g @ F.gelu(hidden).t()]
    return to_maps.view_as(maps), parts


def mix_into(maps: Tensor, mix: HeadMix, room: Tensor) -> Tensor:
    """`mix_heads` of maps (C, i, j), written to `room` where that helps; no mix gives the maps themselves."""
    if mix is None:
        return maps
    if isinstance(mix, HeadMLP):
        return mix_heads(maps[None], mix)[0]
    torch.mm(mix.to(maps.dtype), maps.flatten(1), out=room.view(maps.shape[0], -1))
    return room


def check_mix(name: str, mix: object, heads: int) -> None:
    """Refuse what is no mix of this many heads.

    Raises:
        TypeError: it is no tensor, no `HeadMLP` and not None.
        ValueError: a shape does not fit.
    """
    if mix is None:
        return
    if not isinstance(mix, (Tensor, HeadMLP)):
        raise TypeError(f"{name} must be a (C, C) tensor, a HeadMLP or None, got {type(mix).__name__} {mix!r:.40}")
    if not all(isinstance(part, Tensor) for part in parts_of(mix)):
        raise TypeError(f"{name} must be a HeadMLP of tensors, got {mix!r:.80}")
    shapes = [tuple(part.shape) for part in parts_of(mix)]
    want = [(heads, heads)] if isinstance(mix, Tensor) else [(heads,), (2 * heads, heads), (heads, 2 * heads)]
    if shapes != want:
        raise ValueError(f"{name} must mix the {heads} heads with shapes {want}, got {shapes}")
