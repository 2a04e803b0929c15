"""Blocks that mix several feature streams, as blocks of streams folded into the batch."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from attention_zoo.ops.documents import Documents


class OverStreams(nn.Module):
    """A block of (b, s, n, d) as a block of folded streams: (b s, n, d) -> (b s, n, d).

    A block of fewer streams than the model runs on each group of neighbouring streams: its rows are (b groups).

    Args:
        block: a block with an attribute `streams`, such as `TalkingHeadsAttention`.
    """

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block: Any = block

    def forward(
        self, x: Tensor, *, mask: Tensor | None = None, document_ids: Tensor | Documents | None = None
    ) -> Tensor:
        """(b s, n, d) -> (b s, n, d), mask and document_ids (b s, n)."""
        extra = {} if document_ids is None else {"document_ids": self._row_documents(document_ids)}
        return self.block(self.unfold(x), mask=self._row_mask(mask), **extra).flatten(0, 1)

    def step(self, x: Tensor, state: Any = None, *, mask: Tensor | None = None) -> tuple[Tensor, Any]:
        """New tokens (b s, t, d), and a state with b rows."""
        out, state = self.block.step(self.unfold(x), state, mask=self._row_mask(mask))
        return out.flatten(0, 1), state

    def attention_map(
        self, x: Tensor, *, mask: Tensor | None = None, document_ids: Tensor | Documents | None = None
    ) -> Tensor:
        """(b, s h, i, j), the maps of all streams of a row."""
        extra = {} if document_ids is None else {"document_ids": self._row_documents(document_ids)}
        return self.block.attention_map(self.unfold(x), mask=self._row_mask(mask), **extra)

    def unfold(self, x: Tensor) -> Tensor:
        """(b s, n, d) -> (b, s, n, d)."""
        return x.view(-1, self.block.streams, *x.shape[1:])

    def _row_documents(self, document_ids: Tensor | Documents) -> Tensor | Documents:
        """The documents of the rows, from those of the folded streams."""
        ids = document_ids.ids if isinstance(document_ids, Documents) else document_ids
        origin = document_ids.origin if isinstance(document_ids, Documents) else None
        if origin is not None and len(ids) == len(origin.ids) * self.block.streams:
            return origin
        return ids[:: self.block.streams]

    def _row_mask(self, mask: Tensor | None) -> Tensor | None:
        """(b s, n), the same for all streams of a row -> (b, n)."""
        return None if mask is None else mask[:: self.block.streams]
