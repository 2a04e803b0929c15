"""Full attention: softmax attention over all previous tokens, the baseline of the other layers.

Paper: Attention Is All You Need, https://arxiv.org/abs/1706.03762; grouped queries, https://arxiv.org/abs/2305.13245
"""

from __future__ import annotations

from attention_zoo.attention.base import SelfAttention


class FullAttention(SelfAttention):
    """out_i = sum_j softmax_j(q_i k_j / sqrt(e) + bias_ij) v_j over the visible keys, followed by an output projection.
    With `qk_norm` q and k are normalised per head before `rotary`.

    Time O(n^2 d). Memory O(n d), with `bias` in query tiles; O(n^2) with a mask or a pattern. State: keys and values of
    all tokens, 2 n kv_heads dim_head elements per row.

    Args and Raises: see `SelfAttention`, which holds the whole forward pass.

    Example:
        >>> layer = FullAttention(512, heads=8, kv_heads=2, rotary=Rotary())
        >>> y = layer(torch.randn(2, 100, 512))

        A prefix language model, whose first 20 tokens attend to each other in both directions:

        >>> index = torch.arange(100)
        >>> prefix = (index < 20) | (index <= index[:, None])
        >>> y = FullAttention(512, causal=False)(torch.randn(2, 100, 512), attn_mask=prefix)
    """
