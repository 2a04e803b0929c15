"""Cosine-similarity attention: scores are cosines of queries and keys times a scale, a constant or learned.

Paper: Query-Key Normalization for Transformers, https://arxiv.org/abs/2010.04245
Upstream: flash-cosine-sim-attention, Attention.
Differs: the scale is a constant by default, as upstream; learned, as in the paper, with scale="learned"; padding and
causal masking combine; grouped key/value heads; rotary before the normalisation; a query without visible keys gets 0.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from attention_zoo._checks import check_choice, check_int, check_number
from attention_zoo.attention.base import SelfAttention
from attention_zoo.layers.positions import ALiBi, RelativeBias, RotaryArgument
from attention_zoo.ops.cosine_sim import l2_normalize, scale_unit_queries

SCALES_PER = ("layer", "head")


class CosineSimAttention(SelfAttention):
    """out_i = sum_j softmax_j(scale * q^_i k^_j + bias_ij) v_j, with q^ and k^ l2-normalised in groups of features.

    With scale="learned" the scale is a parameter g, one for all heads or one per head. It starts at log2(L^2 - L), as
    described in the paper, where L is the 97.5th percentile of the lengths of the training sequences. It multiplies the
    normalised queries, in at least float32.

    Time O(n^2 d), memory O(n d). State: normalised keys, and values, of all tokens, 2 n kv_heads dim_head numbers per
    row.

    Args:
        dim, heads, kv_heads, dim_head, causal, dropout, rotary, bias, output_gate, output_gate_per: see
            `SelfAttention`. `rotary` is applied before the normalisation.
        scale: scale of the cosines, the largest possible score with one group: a number, or "learned".
        scale_per: one learned scale for the "layer", or one per "head".
        scale_seq_len: L in tokens, at least 2, from which a learned scale starts. A learned scale needs it, and a
            constant one takes none.
        groups: number of groups of features of a head, each normalised separately; scores then lie in
            scale * [-groups, groups].

    Raises:
        TypeError: `scale` is neither a number nor "learned".
        ValueError: `groups` does not divide `dim_head`, or splits rotary pairs; `scale` is not positive; or
            `scale_seq_len` is below 2, missing for a learned scale or given for a constant one, as `scale_per="head"`.

    Example:
        >>> layer = CosineSimAttention(512, scale="learned", scale_per="head", scale_seq_len=1024)
    """

    def __init__(
        self,
        dim: int,
        *,
        heads: int = 8,
        kv_heads: int | None = None,
        dim_head: int = 64,
        scale: float | str = 8.0,
        scale_per: str = "layer",
        scale_seq_len: int | None = None,
        groups: int = 1,
        causal: bool = True,
        dropout: float = 0.0,
        rotary: RotaryArgument = None,
        bias: RelativeBias | ALiBi | None = None,
        output_gate: str | None = None,
        output_gate_per: str = "feature",
    ) -> None:
        learned = isinstance(scale, str)
        if learned and scale != "learned":
            raise TypeError(f'scale must be a number, got {scale=}: the only name is "learned"')
        check_choice("scale_per", scale_per, SCALES_PER)
        if not learned and scale_per != "layer":
            raise ValueError(f'scale_per must be "layer" with a constant scale, got {scale_per=}, {scale=}')
        if learned != (scale_seq_len is not None):
            rule = "must be given with" if learned else "must be None without"
            raise ValueError(f'scale_seq_len {rule} scale="learned", got {scale_seq_len=}, {scale=}')
        super().__init__(
            dim,
            heads=heads,
            kv_heads=kv_heads,
            dim_head=dim_head,
            causal=causal,
            dropout=dropout,
            scale=1.0 if isinstance(scale, str) else scale,
            rotary=rotary,
            bias=bias,
            output_gate=output_gate,
            output_gate_per=output_gate_per,
        )
        check_int(1, groups=groups)
        if not isinstance(scale, str):
            check_number(scale=scale)  # None, e^-0.5 in `SelfAttention`, is no scale of cosines
        self.learned_scale: nn.Parameter | None = None
        if scale_seq_len is not None:
            check_int(2, scale_seq_len=scale_seq_len)
            start = math.log2(scale_seq_len * (scale_seq_len - 1))
            self.learned_scale = nn.Parameter(torch.full((heads if scale_per == "head" else 1,), start))
        if dim_head % groups:
            raise ValueError(f"groups must divide dim_head, got {groups=}, {dim_head=}")
        if self.rotary is not None and groups > 1 and (dim_head // groups % 2 or self.rotary.pairing == "half"):
            # The norm of a group that holds half of a rotated pair depends on the absolute position.
            raise ValueError(f"groups must not split rotary pairs, got {groups=}, {dim_head=}, {self.rotary}")
        self.groups = groups

    def prepare(self, qk: Tensor, start: int | Tensor) -> Tensor:
        return l2_normalize(super().prepare(qk, start), groups=self.groups)

    def project(self, x: Tensor, start: int | Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = super().project(x, start)
        return q if self.learned_scale is None else scale_unit_queries(q, self.learned_scale), k, v

    def extra_repr(self) -> str:
        scale = self.scale if self.learned_scale is None else f"learned, {len(self.learned_scale)} in all"
        return f"{super().extra_repr()}, scale={scale}, groups={self.groups}"
