"""An attention layer with a norm before it: upstream attention classes contain their norm."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn


class Normed(nn.Module):
    """block(norm(x)).

    Args:
        norm: a norm.
        block: an attention layer.
    """

    def __init__(self, norm: nn.Module, block: nn.Module) -> None:
        super().__init__()
        self.norm = norm
        self.block: Any = block

    def forward(self, x: Tensor, *, mask: Tensor | None = None, attn_mask: Tensor | None = None) -> Tensor:
        """Same shape as x."""
        return self.block(self.norm(x), mask=mask, attn_mask=attn_mask)

    def step(
        self, x: Tensor, state: Any = None, *, mask: Tensor | None = None, attn_mask: Tensor | None = None
    ) -> tuple[Tensor, Any]:
        """See `AttentionBlock.step`."""
        return self.block.step(self.norm(x), state, mask=mask, attn_mask=attn_mask)

    def attention_map(self, x: Tensor, **options: Any) -> Tensor:
        """See `attention_map` of the layer, which takes the options."""
        return self.block.attention_map(self.norm(x), **options)
