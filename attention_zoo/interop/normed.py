"""A block with a norm before it: old attention classes brought their own."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn


class Normed(nn.Module):
    """block(norm(x)).

    Args:
        norm: a norm.
        block: a block of the zoo.
    """

    def __init__(self, norm: nn.Module, block: nn.Module) -> None:
        super().__init__()
        self.norm = norm
        self.block: Any = block

    def forward(self, x: Tensor, *, mask: Tensor | None = None) -> Tensor:
        """The shape of x."""
        out: Tensor = self.block(self.norm(x), mask=mask)
        return out

    def step(self, x: Tensor, state: Any = None, *, mask: Tensor | None = None) -> tuple[Tensor, Any]:
        """New tokens, and the block's state."""
        out, state = self.block.step(self.norm(x), state, mask=mask)
        return out, state

    def attention_map(self, x: Tensor, **options: Any) -> Tensor:
        """The block's map; options are the block's."""
        weights: Tensor = self.block.attention_map(self.norm(x), **options)
        return weights
