"""Full attention: every token sees every token before it.

Paper: Attention Is All You Need, https://arxiv.org/abs/1706.03762; grouped queries, https://arxiv.org/abs/2305.13245
"""

from __future__ import annotations

import torch
from torch import Tensor

from attention_zoo.attention.base import SelfAttention
from attention_zoo.layers.positions import RelativeBias, RotaryEmbedding
from attention_zoo.ops.masks import key_mask
from attention_zoo.ops.softmax import softmax_attention, softmax_attention_weights


class FullAttention(SelfAttention):
    """out_i = sum_j softmax_j(q_i k_j / sqrt(e) + bias_ij) v_j over the keys that i may see, then an output projection.

    Time O(n^2 d), memory O(n d) (O(n^2) with a mask or a bias in forward; a bias that learns is taken in blocks of
    queries). State: keys and values of all tokens.

    Args:
        dim: features d of input and output.
        heads: query heads h.
        kv_heads: key/value heads, each shared by heads / kv_heads query heads. None: as many as heads.
        dim_head: features e of each head.
        causal: hide the future from every token.
        dropout: probability with which an attention weight is dropped in training.
        rotary: turns queries and keys by their position.
        bias: adds to the scores by the distance of key and query.
        rotate_values: `rotary` turns the values too.
        qkv_bias, out_bias: give the projections to queries, keys and values, and the one to the output, biases.
        pattern: (N, N) bool, True where query i (row) may see key j (column), for sequences of up to N tokens; it
            combines with `causal` and with masks, and is saved with the weights.

    Raises:
        ValueError: kv_heads does not divide heads, the bias has another number of heads, the pattern is not square.
        TypeError: the pattern is not boolean.
    """

    pattern: Tensor | None

    def __init__(
        self,
        dim: int,
        *,
        heads: int = 8,
        kv_heads: int | None = None,
        dim_head: int = 64,
        causal: bool = True,
        dropout: float = 0.0,
        rotary: RotaryEmbedding | None = None,
        bias: RelativeBias | None = None,
        rotate_values: bool = False,
        qkv_bias: bool = False,
        out_bias: bool = False,
        pattern: Tensor | None = None,
    ) -> None:
        super().__init__(
            dim,
            heads=heads,
            kv_heads=kv_heads,
            dim_head=dim_head,
            causal=causal,
            dropout=dropout,
            rotary=rotary,
            bias=bias,
            rotate_values=rotate_values,
            qkv_bias=qkv_bias,
            out_bias=out_bias,
        )
        if pattern is not None and (not isinstance(pattern, Tensor) or pattern.dtype != torch.bool):
            raise TypeError(f"pattern must be a boolean tensor, got {getattr(pattern, 'dtype', type(pattern))}")
        if pattern is not None and (pattern.ndim != 2 or pattern.shape[0] != pattern.shape[1]):
            raise ValueError(f"pattern must be square, (N, N), got shape {tuple(pattern.shape)}")
        self.register_buffer("pattern", pattern)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        seen, bias = self._seen(q, k, mask), self.score_bias(q, k)
        return softmax_attention(q, k, v, mask=seen, causal=self.causal, bias=bias, dropout=self._drop)

    def weights(self, q: Tensor, k: Tensor, mask: Tensor | None) -> Tensor:
        seen, bias = self._seen(q, k, mask), self.score_bias(q, k)
        return softmax_attention_weights(q, k, mask=seen, causal=self.causal, bias=bias)

    def _seen(self, q: Tensor, k: Tensor, mask: Tensor | None) -> Tensor | None:
        if self.pattern is None:
            return mask
        i, j = q.shape[-2], k.shape[-2]
        if j > self.pattern.shape[0]:
            raise ValueError(f"x must fit the pattern of {self.pattern.shape[0]} tokens, got {j} tokens")
        allowed = self.pattern[None, None, j - i : j, :j]
        return allowed if mask is None else allowed & key_mask(mask)
