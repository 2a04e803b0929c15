"""Token shift: part of every token's features comes from its neighbours, at no cost in weights.

Upstream: DALLE-pytorch, PreShiftToken.
Differs: prefixes inside the text are shifted too; decoding keeps its own state, for any number of tokens at a time and
across the border of text and image; a masked neighbour counts as 0.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from attention_zoo.layers.state import State, count_tokens, register_state
from attention_zoo.ops.sparse.image_layout import TextImageLayout


@dataclass
class TokenShiftState(State):
    """What a shifted block remembers. Size: b * width * d / 2 numbers beside the block's own state.

    Attributes:
        block: the state of the block, None for a feedforward.
        recent: (b, width, d / 2), the last `width` tokens, 0 where there was none or it was masked.
        seen: tokens so far, a tensor without axes.
    """

    block: Any
    recent: Tensor
    seen: Tensor

    @property
    def length(self) -> int:
        return int(self.seen)


register_state(TokenShiftState)


class TokenShift(nn.Module):
    """block(shifted x), where part of the features of every token is its neighbours':

        text:   the first half from the token before
        image:  the first quarter from the token above, the second from the token to the left

    A neighbour outside the text or the image, or masked, counts as 0.

    Args:
        block: attention, or a feedforward.
        dim: features d, divisible by 4.
        layout: text tokens and size of the image.

    Raises:
        ValueError: 4 does not divide dim.
        TypeError: the block reads a context.
    """

    def __init__(self, block: nn.Module, dim: int, *, layout: TextImageLayout) -> None:
        super().__init__()
        if dim % 4:
            raise ValueError(f"dim must be divisible by 4 for token shift, got {dim=}")
        known = inspect.signature(block.forward).parameters
        if "context" in known:
            raise TypeError(f"block must not read a context to be shifted, got {type(block).__name__}")
        self.block: Any = block
        self.takes_mask = "mask" in known
        self.dim = dim
        self.layout = layout

    def forward(self, x: Tensor, *, mask: Tensor | None = None) -> Tensor:
        """(b, n, d) -> (b, n, d)."""
        self.layout.check(x.shape[1])
        shifted, _ = self._shift(x, mask, self._nothing(x), torch.tensor(0))
        out: Tensor = self.block(shifted, **self._extra(mask))
        return out

    def step(
        self, x: Tensor, state: TokenShiftState | None = None, *, mask: Tensor | None = None
    ) -> tuple[Tensor, TokenShiftState]:
        """Run the block on new tokens (b, t, d)."""
        if state is not None and not isinstance(state, TokenShiftState):
            raise TypeError(f"state must be a TokenShiftState, got {type(state).__name__}")
        recent = self._nothing(x) if state is None else state.recent
        if recent.shape[0] != x.shape[0]:
            raise ValueError(f"state must come from this batch of {x.shape[0]} rows, got {recent.shape[0]} rows")
        seen = torch.tensor(0) if state is None else state.seen
        shifted, recent = self._shift(x, mask, recent, seen)
        block_state = None
        if callable(getattr(self.block, "step", None)):
            y, block_state = self.block.step(shifted, None if state is None else state.block, **self._extra(mask))
        else:
            y = self.block(shifted)
        return y, TokenShiftState(block_state, recent, count_tokens(seen, x.shape[1]))

    def _shift(self, x: Tensor, mask: Tensor | None, recent: Tensor, seen: Tensor) -> tuple[Tensor, Tensor]:
        """Shift tokens that stand at seen, seen + 1, ... after `recent`."""
        t, width, quarter = x.shape[1], self.layout.width, self.dim // 4
        half = x[..., : 2 * quarter]
        if mask is not None:
            half = torch.where(mask[..., None], half, half.new_zeros(()))
        known = torch.cat((recent, half), dim=1)  # (b, width + t, d / 2)
        before, above = known[:, width - 1 : -1], known[:, :t]
        if t == 1 and not torch.compiler.is_compiling():
            first, second = self._of_one(before, above, int(seen) - self.layout.text_len)
        else:
            index = torch.arange(t, device=x.device) + seen.to(x.device) - self.layout.text_len
            is_text, inside_row, below_first = index < 0, index % width > 0, index >= width
            upper = above[..., :quarter] * below_first[:, None]
            first = torch.where(is_text[:, None], before[..., :quarter], upper)
            second = before[..., quarter:] * (is_text | inside_row)[:, None]
        return torch.cat((first, second, x[..., 2 * quarter :]), dim=-1), known[:, t:]

    def _of_one(self, before: Tensor, above: Tensor, place: int) -> tuple[Tensor, Tensor]:
        """Both quarters for the token at this place of the image, below 0 for text, without any arithmetic."""
        quarter, width = self.dim // 4, self.layout.width
        first, second = before[..., :quarter], before[..., quarter:]
        if place >= 0:
            first = above[..., :quarter] if place >= width else torch.zeros_like(first)
            second = second if place % width else torch.zeros_like(second)
        return first, second

    def _nothing(self, x: Tensor) -> Tensor:
        return x.new_zeros(x.shape[0], self.layout.width, self.dim // 2)

    def _extra(self, mask: Tensor | None) -> dict[str, Tensor | None]:
        return {"mask": mask} if self.takes_mask else {}

    def extra_repr(self) -> str:
        return str(self.layout)
