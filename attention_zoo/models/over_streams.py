"""Blocks that mix several feature streams, as blocks of streams folded into the batch."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn


class OverStreams(nn.Module):
    """A block of (b, s, n, d) as a block of folded streams: (b s, n, d) -> (b s, n, d).

    Args:
        block: a block with an attribute `streams`, such as `TalkingHeadsAttention`.
    """

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block: Any = block

    def forward(self, x: Tensor, *, mask: Tensor | None = None) -> Tensor:
        """(b s, n, d) -> (b s, n, d), mask (b s, n)."""
        return self.block(self.unfold(x), mask=self._row_mask(mask)).flatten(0, 1)

    def step(self, x: Tensor, state: Any = None, *, mask: Tensor | None = None) -> tuple[Tensor, Any]:
        """New tokens (b s, t, d), and a state with b rows."""
        out, state = self.block.step(self.unfold(x), state, mask=self._row_mask(mask))
        return out.flatten(0, 1), state

    def attention_map(self, x: Tensor, *, mask: Tensor | None = None) -> Tensor:
        """(b, s h, i, j), the maps of all streams of a row."""
        return self.block.attention_map(self.unfold(x), mask=self._row_mask(mask))

    def unfold(self, x: Tensor) -> Tensor:
        """(b s, n, d) -> (b, s, n, d)."""
        return x.view(-1, self.block.streams, *x.shape[1:])

    def _row_mask(self, mask: Tensor | None) -> Tensor | None:
        """(b s, n), the same for all streams of a row -> (b, n)."""
        return None if mask is None else mask[:: self.block.streams]
