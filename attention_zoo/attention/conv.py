"""Convolution-like attention: an image token attends to the text and to a window of the image that ends at it.

Paper: DALL-E, https://arxiv.org/abs/2102.12092
Upstream: DALLE-pytorch, SparseConvCausalAttention.
Differs: padding masks apply to every query and key; decoding is cached, for any number of tokens at a time; height and
width may differ; the window may include its upper right part; values are not rotated.
"""

from __future__ import annotations

from attention_zoo._checks import check_instance
from attention_zoo.attention.base import SelfAttention
from attention_zoo.layers.positions import RotaryArgument
from attention_zoo.ops.sparse import ConvPattern, TextImageLayout


class ConvAttention(SelfAttention):
    """out_i = sum_j softmax_j(q_i k_j / sqrt(e)) v_j over the text before i and a window of the image that ends at i.

    What an image token x attends to with kernel_size=3, window "quadrant" (left) and "causal" (right):

        o o o . .        . o o o .
        o o o . .        . o x . .
        o o x . .        . . . . .

    Always causal. Time O(n (text + kernel_size * dilation * width) d), memory O(n d); O(n^2) with dropout. State: keys
    and values of all tokens; decoding an image token reads O(text + kernel_size^2) of them.

    Args:
        dim, heads, dim_head, dropout, rotary, out_bias: see `SelfAttention`.
        layout: number of text tokens and size of the image; the sequence is a prefix of it.
        kernel_size: width and height of the window, odd.
        dilation: distance of neighbouring rows and columns of the window.
        window: "quadrant" (above and left of the token) or "causal" (the part of the centred kernel before the token).

    Raises:
        ValueError: `kernel_size` is even, `window` is unknown, a size is below 1, or the image has one row or column;
            for that `WindowAttention` is faster.
    """

    def __init__(
        self,
        dim: int,
        *,
        layout: TextImageLayout,
        kernel_size: int = 5,
        dilation: int = 1,
        window: str = "quadrant",
        heads: int = 8,
        dim_head: int = 64,
        dropout: float = 0.0,
        rotary: RotaryArgument = None,
        out_bias: bool = False,
    ) -> None:
        check_instance(TextImageLayout, layout=layout)
        if 1 in (layout.height, layout.width) and layout.height != layout.width:  # every token would be a tile
            raise ValueError(
                "layout must have several rows and columns, a window over one of them is that of WindowAttention, got "
                f"{layout}"
            )
        super().__init__(
            dim,
            heads=heads,
            dim_head=dim_head,
            dropout=dropout,
            rotary=rotary,
            pattern=ConvPattern(layout, kernel_size, dilation, window),
            out_bias=out_bias,
        )
        self.layout = layout
