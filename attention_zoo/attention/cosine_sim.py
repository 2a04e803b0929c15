"""Cosine-similarity attention: scores are cosines of queries and keys times a fixed scale.

Paper: Query-Key Normalization for Transformers, https://arxiv.org/abs/2010.04245
Upstream: flash-cosine-sim-attention, Attention.
Differs: the scale is a constant, as upstream, and not learned, as in the paper; padding and causal masking combine;
grouped key/value heads; rotary before the normalisation; a query without visible keys gets 0.
"""

from __future__ import annotations

from torch import Tensor

from attention_zoo._checks import check_int, check_number
from attention_zoo.attention.base import SelfAttention
from attention_zoo.layers.positions import ALiBi, RelativeBias, RotaryArgument
from attention_zoo.ops.cosine_sim import l2_normalize


class CosineSimAttention(SelfAttention):
    """out_i = sum_j softmax_j(scale * q^_i k^_j + bias_ij) v_j, with q^ and k^ l2-normalised in groups of features.

    Time O(n^2 d), memory O(n d). State: normalised keys, and values, of all tokens, 2 n kv_heads dim_head numbers per
    row.

    Args:
        dim, heads, kv_heads, dim_head, causal, dropout, rotary, bias, output_gate, output_gate_per: see
            `SelfAttention`. `rotary` is applied before the normalisation.
        scale: scale of the cosines, the largest possible score with one group.
        groups: number of groups of features of a head, each normalised separately; scores then lie in
            scale * [-groups, groups].

    Raises:
        ValueError: `groups` does not divide `dim_head`, or splits rotary pairs; `scale` is not positive.
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
        rotary: RotaryArgument = None,
        bias: RelativeBias | ALiBi | None = None,
        output_gate: str | None = None,
        output_gate_per: str = "feature",
    ) -> None:
        super().__init__(
            dim,
            heads=heads,
            kv_heads=kv_heads,
            dim_head=dim_head,
            causal=causal,
            dropout=dropout,
            scale=scale,
            rotary=rotary,
            bias=bias,
            output_gate=output_gate,
            output_gate_per=output_gate_per,
        )
        check_int(1, groups=groups)
        check_number(scale=scale)  # None, e^-0.5 in `SelfAttention`, is no scale of cosines
        if dim_head % groups:
            raise ValueError(f"groups must divide dim_head, got {groups=}, {dim_head=}")
        if self.rotary is not None and groups > 1 and (dim_head // groups % 2 or self.rotary.pairing == "half"):
            # The norm of a group that holds half of a rotated pair depends on the absolute position.
            raise ValueError(f"groups must not split rotary pairs, got {groups=}, {dim_head=}, {self.rotary}")
        self.groups = groups

    def prepare(self, qk: Tensor, start: int | Tensor) -> Tensor:
        return l2_normalize(super().prepare(qk, start), groups=self.groups)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, scale={self.scale}, groups={self.groups}"
