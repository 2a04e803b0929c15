"""Cosine-sim attention: scores are cosines times a fixed scale, so they cannot grow with the weights.

Paper: Query-Key Normalization for Transformers, https://arxiv.org/abs/2010.04245
Upstream: flash-cosine-sim-attention, Attention.
Differs: padding and causality combine; grouped-query heads; rotary before the norm; a row with nothing to see gives 0.
"""

from __future__ import annotations

from torch import Tensor

from attention_zoo.attention.base import SelfAttention
from attention_zoo.layers.positions import RelativeBias, RotaryEmbedding
from attention_zoo.ops.cosine_sim import l2_normalize
from attention_zoo.ops.softmax import softmax_attention, softmax_attention_weights


class CosineSimAttention(SelfAttention):
    """out_i = sum_j softmax_j(scale * q^_i k^_j + bias_ij) v_j, q^ and k^ l2-normalised in groups of features.

    Time O(n^2 d), memory O(n d). State: normalised keys, and values, of all tokens.

    Args:
        dim: features d of input and output.
        heads: query heads h.
        kv_heads: key/value heads, each shared by heads / kv_heads query heads. None: as many as heads; 1: one for all.
        dim_head: features e of each head.
        scale: the largest score; small scales mean soft attention.
        groups: slices of a head normalised separately; scores then lie in scale * [-groups, groups].
        causal: hide the future from every token.
        dropout: probability with which an attention weight is dropped in training.
        rotary: turns queries and keys by their position, before the norm.
        bias: adds to the scores by the distance of key and query.

    Raises:
        ValueError: groups does not divide dim_head or, beside rotary, leaves slices of odd size; kv_heads does not
            divide heads; scale is not positive.
    """

    def __init__(
        self,
        dim: int,
        *,
        heads: int = 8,
        kv_heads: int | None = None,
        dim_head: int = 64,
        scale: float = 8.0,
        groups: int = 1,
        causal: bool = True,
        dropout: float = 0.0,
        rotary: RotaryEmbedding | None = None,
        bias: RelativeBias | None = None,
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
        )
        if groups < 1 or dim_head % groups:
            raise ValueError(f"groups must divide dim_head, got {groups=}, {dim_head=}")
        if rotary is not None and groups > 1 and dim_head // groups % 2:
            # the norm of a slice that holds half a pair changes as the pair turns: absolute positions would show
            raise ValueError(f"groups must leave rotary whole pairs in a slice, got {groups=}, {dim_head=}")
        if not scale > 0:
            raise ValueError(f"scale must be positive, got {scale=}")
        self.scale = scale
        self.groups = groups

    def prepare(self, qk: Tensor, start: int) -> Tensor:
        return l2_normalize(super().prepare(qk, start), groups=self.groups)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        bias = self.score_bias(q, k)
        return softmax_attention(
            q, k, v, mask=mask, causal=self.causal, bias=bias, scale=self.scale, dropout=self._drop
        )

    def weights(self, q: Tensor, k: Tensor, mask: Tensor | None) -> Tensor:
        bias = self.score_bias(q, k)
        return softmax_attention_weights(q, k, mask=mask, causal=self.causal, bias=bias, scale=self.scale)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, scale={self.scale}, groups={self.groups}"
