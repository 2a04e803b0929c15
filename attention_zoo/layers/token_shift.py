"""Token shift: part of the features of every token is replaced by those of its neighbours; it has no parameters.

Upstream: DALLE-pytorch, PreShiftToken.
Differs: prefixes inside the text are shifted too; decoding has its own state, for any number of tokens at a time and
across the boundary of text and image; a masked neighbour is replaced by 0.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from attention_zoo._checks import check_instance, check_int
from attention_zoo.layers.state import (
    State,
    check_state,
    check_state_dtype,
    check_state_shape,
    count_tokens,
    register_state,
)
from attention_zoo.ops.sparse import TextImageLayout


@dataclass
class TokenShiftState(State):
    """Decoding state of a shifted layer. Size: width * d / 2 elements per row, plus the state of the layer itself.

    Attributes:
        block: the state of the layer, None for a feedforward.
        recent: (b, width, d / 2), the features of the last `width` tokens; 0 for missing or masked ones.
        token_count: number of tokens so far, a 0-d tensor.
    """

    block: Any
    recent: Tensor
    token_count: Tensor


register_state(TokenShiftState)


class TokenShift(nn.Module):
    """block(shift(x)), where part of the features of every token comes from its neighbours:

        text:   the first half from the previous token
        image:  the first quarter from the token above, the second quarter from the token to the left

    A neighbour outside the text or the image, or a masked one, is replaced by 0.

    Args:
        block: an attention layer or a feedforward.
        dim: features d, divisible by 4.
        layout: number of text tokens and size of the image.

    Raises:
        ValueError: `dim` is not divisible by 4.
        TypeError: `block` takes a context.
    """

    def __init__(self, block: nn.Module, dim: int, *, layout: TextImageLayout) -> None:
        super().__init__()
        check_int(1, dim=dim)
        check_instance(TextImageLayout, layout=layout)
        if dim % 4:
            raise ValueError(f"dim must be divisible by 4 for token shift, got {dim=}")
        parameters = inspect.signature(block.forward).parameters
        if "context" in parameters:
            raise TypeError(f"block must not take a context with token shift, got {type(block).__name__}")
        self.block: Any = block
        self.takes_mask = "mask" in parameters
        self.dim = dim
        self.layout = layout

    def forward(self, x: Tensor, *, mask: Tensor | None = None) -> Tensor:
        """(b, n, d) -> (b, n, d), with mask (b, n) bool, True = a valid token.

        Raises:
            ValueError: the sequence is longer than the layout.
        """
        self.layout.check(x.shape[1])
        shifted, _ = self._shift(x, mask, self._no_tokens(x), count_tokens(None, 0, x.device))
        return self.block(shifted, **self._extra(mask))

    def attention_map(self, x: Tensor, *, mask: Tensor | None = None) -> Tensor:
        """The attention map of the layer. Arguments as in `forward`."""
        self.layout.check(x.shape[1])
        shifted, _ = self._shift(x, mask, self._no_tokens(x), count_tokens(None, 0, x.device))
        return self.block.attention_map(shifted, **self._extra(mask))

    def step(
        self, x: Tensor, state: TokenShiftState | None = None, *, mask: Tensor | None = None
    ) -> tuple[Tensor, TokenShiftState]:
        """Decode new tokens: (b, t, d) -> (b, t, d) and the new state. See `AttentionBlock.step`."""
        check_state(state, TokenShiftState)
        recent = self._no_tokens(x) if state is None else state.recent
        check_state_dtype(recent, x)
        check_state_shape(recent, "(b, width, dim / 2)", (x.shape[0], self.layout.width, self.dim // 2))
        count = count_tokens(None, 0, x.device) if state is None else state.token_count
        shifted, recent = self._shift(x, mask, recent, count)
        block_state = None
        if callable(getattr(self.block, "step", None)):
            y, block_state = self.block.step(shifted, None if state is None else state.block, **self._extra(mask))
        else:
            y = self.block(shifted)
        return y, TokenShiftState(block_state, recent, count_tokens(count, x.shape[1], x.device))

    def _shift(self, x: Tensor, mask: Tensor | None, recent: Tensor, start: Tensor) -> tuple[Tensor, Tensor]:
        """Shift tokens at the positions start, start + 1, ...; `recent` are the tokens before them."""
        t, width, quarter = x.shape[1], self.layout.width, self.dim // 4
        half = x[..., : 2 * quarter]
        if mask is not None:
            half = torch.where(mask[..., None], half, half.new_zeros(()))
        history = torch.cat((recent, half), dim=1)  # (b, width + t, d / 2)
        previous, above = history[:, width - 1 : -1], history[:, :t]
        if t == 1 and start.device.type == "cpu" and not torch.compiler.is_compiling():
            first, second = self._shift_one(previous, above, int(start) - self.layout.text_len)
        else:
            index = torch.arange(t, device=x.device) + start - self.layout.text_len
            is_text, has_left, has_above = index < 0, index % width > 0, index >= width
            upper = above[..., :quarter] * has_above[:, None]
            first = torch.where(is_text[:, None], previous[..., :quarter], upper)
            second = previous[..., quarter:] * (is_text | has_left)[:, None]
        return torch.cat((first, second, x[..., 2 * quarter :]), dim=-1), history[:, t:]

    def _shift_one(self, previous: Tensor, above: Tensor, position: int) -> tuple[Tensor, Tensor]:
        """Both quarters of one token at this position of the image (below 0: text): the fast path of decoding."""
        quarter, width = self.dim // 4, self.layout.width
        first, second = previous[..., :quarter], previous[..., quarter:]
        if position >= 0:
            first = above[..., :quarter] if position >= width else torch.zeros_like(first)
            second = second if position % width else torch.zeros_like(second)
        return first, second

    def _no_tokens(self, x: Tensor) -> Tensor:
        return x.new_zeros(x.shape[0], self.layout.width, self.dim // 2)

    def _extra(self, mask: Tensor | None) -> dict[str, Tensor | None]:
        return {"mask": mask} if self.takes_mask else {}

    def extra_repr(self) -> str:
        return str(self.layout)
