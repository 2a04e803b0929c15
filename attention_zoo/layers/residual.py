"""Residual rules: how a sub-layer's branch and the stream around it meet.

Papers: pre-norm, https://arxiv.org/abs/2002.04745; sandwich, https://arxiv.org/abs/2105.13290;
DeepNet, https://arxiv.org/abs/2203.00555
"""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor, nn

from attention_zoo.layers.layer_scale import LayerScale
from attention_zoo.layers.norms import make_norm
from attention_zoo.layers.projections import Projections

Norm = str | Callable[[int], nn.Module]


class Residual(nn.Module):
    """One residual connection, in two halves, so that forward, step and context share it.

    Args:
        dim: features d.
        norm: a name in NORMS or a function of dim.
        depth: layers of the whole stack, for rules that scale by it.
        scale: where the learned factors of `LayerScale` on the branch start; None for no such factors.
    """

    final_norm = False  # whether the stream needs a norm after the last layer
    additive = False  # whether merge(x, y) is x + delta(y), which reversible streams need

    def __init__(self, dim: int, *, norm: Norm = "layer", depth: int = 1, scale: float | None = None) -> None:
        super().__init__()
        self.norm = make_norm(norm, dim)
        self.scale = None if scale is None else LayerScale(dim, start=scale)

    def branch(self, x: Tensor) -> Tensor:
        """What the sub-layer sees of the stream x."""
        raise TypeError(f"{type(self).__name__} must define branch")

    def delta(self, y: Tensor) -> Tensor:
        """What of a sub-layer's output y joins the stream."""
        return y if self.scale is None else cast(Tensor, self.scale(y))

    def merge(self, x: Tensor, y: Tensor) -> Tensor:
        """The stream after the sub-layer that turned branch(x) into y."""
        return x + self.delta(y)

    def initialize(self, block: nn.Module) -> None:
        """Adapt the fresh weights of the sub-layer to this rule."""


class PreNorm(Residual):
    """x + f(norm(x))."""

    final_norm = True
    additive = True

    def branch(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.norm(x))


class SandwichNorm(Residual):
    """x + norm_out(f(norm(x)))."""

    final_norm = True
    additive = True

    def __init__(self, dim: int, *, norm: Norm = "layer", depth: int = 1, scale: float | None = None) -> None:
        super().__init__(dim, norm=norm, depth=depth, scale=scale)
        self.norm_out = make_norm(norm, dim)

    def branch(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.norm(x))

    def delta(self, y: Tensor) -> Tensor:
        return super().delta(self.norm_out(y))


class PostNorm(Residual):
    """norm(x + f(x))."""

    def branch(self, x: Tensor) -> Tensor:
        return x

    def merge(self, x: Tensor, y: Tensor) -> Tensor:
        return cast(Tensor, self.norm(x + self.delta(y)))


class DeepNorm(Residual):
    """norm(a x + f(x)) with a = (2 depth)^(1/4).

    Weights start as in the paper's decoder-only case: xavier normal, with gain (8 depth)^(-1/4) for values, outputs
    and feedforward, and gain 1 for queries and keys.
    """

    def __init__(self, dim: int, *, norm: Norm = "layer", depth: int = 1, scale: float | None = None) -> None:
        super().__init__(dim, norm=norm, depth=depth, scale=scale)
        self.alpha = (2 * depth) ** 0.25
        self.gain = (8 * depth) ** -0.25

    def branch(self, x: Tensor) -> Tensor:
        return x

    def merge(self, x: Tensor, y: Tensor) -> Tensor:
        return cast(Tensor, self.norm(self.alpha * x + self.delta(y)))

    @torch.no_grad()
    def initialize(self, block: nn.Module) -> None:
        for name, module in block.named_modules():
            if isinstance(module, Projections):
                for part in module.sizes:
                    nn.init.xavier_normal_(module.part(part), gain=1.0 if part in ("q", "k") else self.gain)
            elif isinstance(module, nn.Linear):
                plain = name.rpartition(".")[-1] in ("to_q", "to_k")
                nn.init.xavier_normal_(module.weight, gain=1.0 if plain else self.gain)


RESIDUALS: dict[str, type[Residual]] = {
    "pre": PreNorm,
    "post": PostNorm,
    "sandwich": SandwichNorm,
    "deepnorm": DeepNorm,
}
