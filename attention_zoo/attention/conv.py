"""Convolution-like attention: an image token sees the text and a window of the image that ends at it.

Paper: DALL-E, https://arxiv.org/abs/2102.12092
Upstream: DALLE-pytorch, SparseConvCausalAttention.
Differs: masks are honoured by every query and key; decoding is cached, any number of tokens at a time; height and width
may differ; the window may have its upper-right part; values are not rotated unless asked for.
"""

from __future__ import annotations

from attention_zoo.attention.base import PatternAttention
from attention_zoo.layers.positions import RotaryEmbedding
from attention_zoo.ops.sparse.conv import ConvPattern
from attention_zoo.ops.sparse.image_layout import TextImageLayout


class ConvAttention(PatternAttention):
    """out_i = sum_j softmax_j(q_i k_j / sqrt(e)) v_j over the text before i, and a window of the image that ends at i.

    The window of x for kernel_size=3, "quadrant" and "causal":

        o o o . .        . o o o .
        o o o . .        . o x . .
        o o x . .        . . . . .

    Always causal. Time O(n (text + kernel_size * dilation * width) d), memory O(n d); with dropout O(n^2). State: keys
    and values of all tokens, of which an image token reads O(text + kernel_size^2).

    Args:
        dim: features d of input and output.
        layout: text tokens and size of the image; the sequence is a prefix of it.
        kernel_size: width and height of the window, odd.
        dilation: distance between neighbouring rows and columns of the window.
        window: "quadrant", above and left of the token, or "causal", all of the kernel around it that precedes it.
        heads: heads h.
        dim_head: features e of each head.
        dropout: probability with which an attention weight is dropped in training.
        rotary: turns queries and keys by their position.
        rotate_values: `rotary` turns the values too, as in old checkpoints.
        out_bias: give the output projection a bias.

    Raises:
        ValueError: kernel_size is even, an unknown window, a size below 1.
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
        rotary: RotaryEmbedding | None = None,
        rotate_values: bool = False,
        out_bias: bool = False,
    ) -> None:
        super().__init__(
            dim,
            heads=heads,
            dim_head=dim_head,
            dropout=dropout,
            rotary=rotary,
            rotate_values=rotate_values,
            out_bias=out_bias,
        )
        self.layout = layout
        self._pattern = ConvPattern(layout, kernel_size, dilation, window)

    def pattern(self) -> ConvPattern:
        return self._pattern

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, {self._pattern}"
