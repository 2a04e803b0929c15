"""Block-sparse attention: blocks of tokens attend to their neighbourhood, the text, and a few random blocks.

The layout of the blocks is DeepSpeed's "variable" layout, VariableSparsityConfig, with local groups of one size, global
columns and random blocks. It is related to, and not the pattern of, the papers below.

Papers: Sparse Transformer, https://arxiv.org/abs/1904.10509; Big Bird, https://arxiv.org/abs/2007.14062
Upstream: DALLE-pytorch, SparseAttention, over DeepSpeed's VariableSparsityConfig.
Differs: from upstream: plain torch, on any device; the global blocks are those that hold text, whatever its length; the
random blocks are saved with the weights; padding masks and cached decoding. From Sparse Transformer: its strided and
fixed patterns are missing; a table of them can be given to `FullAttention` as `pattern`. From Big Bird: the local
blocks are groups, not a window that slides, and the global blocks attend as the others do.
"""

from __future__ import annotations

from attention_zoo._checks import check_flag, check_instance, check_int
from attention_zoo.attention.base import ImageAttention
from attention_zoo.layers.positions import RotaryArgument
from attention_zoo.ops.sparse import BlockSparsePattern, TextImageLayout, choose_blocks


class BlockSparseAttention(ImageAttention):
    """out_i = sum_j softmax_j(q_i k_j / sqrt(e)) v_j over the tokens j <= i in the blocks visible to the block of i.

    Visible blocks with local_blocks=2, one global and one random block (g global, l local, r random):

        l
        l l
        g . l
        g r l l
        g . . r l

    Time proportional to the number of visible blocks, memory O(n d); O(n^2) with dropout, and on devices other than the
    CPU, where the full mask is faster. Blocks of 64 tokens are
    efficient, blocks of 16 are not. State: keys and values of all tokens. The pattern is a buffer, saved with the
    weights.

    Args:
        dim, heads, dim_head, causal, dropout, rotary, out_bias: see `SelfAttention`.
        layout: number of text tokens and size of the image; the sequence is a prefix of it. For images alone,
            `TextImageLayout(0, height, width)`; `forward` takes them as (b, height, width, d) too.
        block_size: tokens per block.
        local_blocks: number of neighbouring blocks that form a group and attend to each other.
        global_blocks: number of first blocks that all blocks attend to. Default: the blocks that hold text.
        random_blocks: number of random columns per row of blocks, drawn from all columns; with causal masking those
            after the row have no effect.
        seed: seed of the random blocks.

    Raises:
        ValueError: a number is below its minimum.
    """

    def __init__(
        self,
        dim: int,
        *,
        layout: TextImageLayout,
        block_size: int = 64,
        local_blocks: int = 4,
        global_blocks: int | None = None,
        random_blocks: int = 4,
        seed: int = 0,
        heads: int = 8,
        dim_head: int = 64,
        causal: bool = True,
        dropout: float = 0.0,
        rotary: RotaryArgument = None,
        out_bias: bool = False,
    ) -> None:
        check_instance(TextImageLayout, layout=layout)
        check_flag(causal=causal)
        check_int(1, block_size=block_size)
        blocks = choose_blocks(
            -(-layout.length // block_size),
            local_blocks=local_blocks,
            global_blocks=-(-layout.text_len // block_size) if global_blocks is None else global_blocks,
            random_blocks=random_blocks,
            causal=causal,
            seed=seed,
        )
        super().__init__(
            dim,
            layout=layout,
            pattern=BlockSparsePattern(blocks, block_size, causal, layout.length),
            heads=heads,
            dim_head=dim_head,
            causal=causal,
            dropout=dropout,
            rotary=rotary,
            out_bias=out_bias,
        )
