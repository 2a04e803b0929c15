"""Residual connections around sub-layers.

Papers: pre-norm, https://arxiv.org/abs/2002.04745; sandwich norm, https://arxiv.org/abs/2105.13290;
DeepNet, https://arxiv.org/abs/2203.00555
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from attention_zoo._checks import check_int
from attention_zoo.layers.layer_scale import LayerScale
from attention_zoo.layers.norms import make_norm
from attention_zoo.layers.projections import Projections

Norm = str | tuple[str, Mapping[str, Any]] | Callable[[int], nn.Module]


class Residual(nn.Module):
    """A residual connection in two halves, shared by `forward` and `step`: x -> merge(x, f(branch(x))).

    Args:
        dim: features d.
        norm: a name in NORMS, `(name, options)`, or a function of dim that returns a module.
        depth: number of layers of the stack.
        scale: initial value of the factors of `LayerScale` on the output of the sub-layer; None for no LayerScale.

    Attributes:
        final_norm: whether the stack needs a norm after its last layer.
        additive: whether merge(x, y) is x + delta(y), as reversible streams require.
    """

    final_norm = False
    additive = False

    def __init__(self, dim: int, *, norm: Norm = "layer", depth: int = 1, scale: float | None = None) -> None:
        super().__init__()
        check_int(1, dim=dim, depth=depth)
        self.norm = make_norm(norm, dim)
        self.scale = None if scale is None else LayerScale(dim, start=scale)

    def branch(self, x: Tensor) -> Tensor:
        """The input of the sub-layer."""
        raise NotImplementedError

    def delta(self, y: Tensor) -> Tensor:
        """What is added to the residual stream for the output y of the sub-layer."""
        return y if self.scale is None else self.scale(y)

    def merge(self, x: Tensor, y: Tensor) -> Tensor:
        """The residual stream after a sub-layer with the output y."""
        return x + self.delta(y)

    def initialize(self, block: nn.Module) -> None:
        """Initialise the weights of the sub-layer as this residual connection requires."""


class PreNorm(Residual):
    """x + f(norm(x))."""

    final_norm = True
    additive = True

    def branch(self, x: Tensor) -> Tensor:
        return self.norm(x)


class SandwichNorm(Residual):
    """x + norm_out(f(norm(x)))."""

    final_norm = True
    additive = True

    def __init__(self, dim: int, *, norm: Norm = "layer", depth: int = 1, scale: float | None = None) -> None:
        super().__init__(dim, norm=norm, depth=depth, scale=scale)
        self.norm_out = make_norm(norm, dim)

    def branch(self, x: Tensor) -> Tensor:
        return self.norm(x)

    def delta(self, y: Tensor) -> Tensor:
        return super().delta(self.norm_out(y))


class PostNorm(Residual):
    """norm(x + f(x))."""

    def branch(self, x: Tensor) -> Tensor:
        return x

    def merge(self, x: Tensor, y: Tensor) -> Tensor:
        return self.norm(x + self.delta(y))


class DeepNorm(Residual):
    """norm(a x + f(x)) with a = (2 depth)^(1/4).

    Weights are initialised as in the paper's decoder-only case: Xavier normal with gain (8 depth)^(-1/4) for values,
    output projections and feedforwards, and gain 1 for queries and keys.
    """

    def __init__(self, dim: int, *, norm: Norm = "layer", depth: int = 1, scale: float | None = None) -> None:
        super().__init__(dim, norm=norm, depth=depth, scale=scale)
        self.alpha = (2 * depth) ** 0.25
        self.gain = (8 * depth) ** -0.25

    def branch(self, x: Tensor) -> Tensor:
        return x

    def merge(self, x: Tensor, y: Tensor) -> Tensor:
        return self.norm(self.alpha * x + self.delta(y))

    @torch.no_grad()
    def initialize(self, block: nn.Module) -> None:
        for name, module in block.named_modules():
            if isinstance(module, Projections):
                for part in module.sizes:
                    nn.init.xavier_normal_(module.part(part), gain=1.0 if part in ("q", "k") else self.gain)
            elif isinstance(module, nn.Linear):
                is_query_or_key = name.rpartition(".")[-1] in ("to_q", "to_k")
                nn.init.xavier_normal_(module.weight, gain=1.0 if is_query_or_key else self.gain)


RESIDUALS: dict[str, type[Residual]] = {
    "pre": PreNorm,
    "post": PostNorm,
    "sandwich": SandwichNorm,
    "deepnorm": DeepNorm,
}
