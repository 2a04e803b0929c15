"""Talking-heads attention: the attention maps of all heads are mixed before and after the softmax.

Papers: Talking-Heads Attention, https://arxiv.org/abs/2003.02436; Multi-Stream Transformers,
    https://arxiv.org/abs/2107.10342
Upstream: quartic-transformer, Attention.
Differs: the scale is dim_head^-0.5 and not dim_head^0.5; any number of streams, never mixed across batch rows; causal
decoding; memory linear in the sequence length. From the first paper: an output gate, as upstream.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from attention_zoo._checks import check_choice, check_int
from attention_zoo.attention.base import SelfAttention
from attention_zoo.layers.positions import RotaryArgument
from attention_zoo.ops.documents import Documents
from attention_zoo.ops.talking_heads import (
    HeadMix,
    HeadMLP,
    mix_heads,
    talking_heads_attention,
    talking_heads_weights,
)

MIXES = ("linear", "mlp")


class HeadMixer(nn.Module):
    """Parameters of head mixing, a map across the heads of attention maps, initialised to the identity.

    Args:
        heads: number of maps.
        kind: "linear" or "mlp".
    """

    def __init__(self, heads: int, kind: str) -> None:
        super().__init__()
        self.kind = kind
        if kind == "linear":
            self.weight = nn.Parameter(torch.eye(heads))
        else:
            self.norm = nn.Parameter(torch.ones(heads))
            self.w1 = nn.Parameter(torch.empty(2 * heads, heads))
            self.w2 = nn.Parameter(torch.zeros(heads, 2 * heads))
            nn.init.normal_(self.w1, std=heads**-0.5)

    def forward(self) -> HeadMix:
        """The parameters as an argument of `talking_heads_attention`."""
        return self.weight if self.kind == "linear" else HeadMLP(self.norm, self.w1, self.w2)


class TalkingHeadsAttention(SelfAttention):
    """out = post_softmax(softmax(pre_softmax(q k^T / sqrt(e)))) v, times an output gate, by default per head and token.

    `pre_softmax` and `post_softmax` mix the maps of all s h heads of one batch row at every pair of query and key. An
    output projection follows. An additive `attn_mask` is added after `pre_softmax`; its heads are all s h.

    Time O(n^2 (d + (s h)^2)), memory O(n d). State: keys and values of all tokens of all streams.

    Args:
        dim, heads, dim_head, scale, rotary, causal, dropout, output_gate, output_gate_per: see `SelfAttention`; `heads`
            is the number of heads h of each stream. Dropout is applied before `post_softmax`.
        streams: number of streams s whose heads are mixed. The input is (b, n, d), or (b, s, n, d) with s streams.
        pre_softmax, post_softmax: head mixing before and after the softmax: "linear", "mlp" or None.

    Raises:
        ValueError: `pre_softmax` or `post_softmax` is unknown, or a size is below 1.
    """

    def __init__(
        self,
        dim: int,
        *,
        heads: int = 8,
        dim_head: int = 64,
        streams: int = 1,
        pre_softmax: str | None = "linear",
        post_softmax: str | None = "linear",
        scale: float | None = None,
        rotary: RotaryArgument = None,
        causal: bool = True,
        dropout: float = 0.0,
        output_gate: str | None = "sigmoid",
        output_gate_per: str = "head",
    ) -> None:
        super().__init__(
            dim,
            heads=heads,
            dim_head=dim_head,
            causal=causal,
            dropout=dropout,
            scale=scale,
            rotary=rotary,
            output_gate=output_gate,
            output_gate_per=output_gate_per,
        )
        check_int(1, streams=streams)
        for name, kind in (("pre_softmax", pre_softmax), ("post_softmax", post_softmax)):
            if kind is not None:
                check_choice(name, kind, MIXES)
        self.streams = streams
        self.pre_softmax = None if pre_softmax is None else HeadMixer(streams * heads, pre_softmax)
        self.post_softmax = None if post_softmax is None else HeadMixer(streams * heads, post_softmax)

    def project(self, x: Tensor, start: int | Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values (b, s h, n, e)."""
        q, k, v = super().project(x, start)
        return (q, k, v) if x.ndim == 3 else (q.flatten(1, 2), k.flatten(1, 2), v.flatten(1, 2))

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        return talking_heads_attention(
            q,
            k,
            v,
            _mix(self.pre_softmax),
            _mix(self.post_softmax),
            causal=self.causal,
            mask=mask,
            scale=self.scale,
            dropout=self.dropout_now,
        )

    def softmax_weights(self, q: Tensor, k: Tensor, mask: Tensor | None) -> Tensor:
        """The softmax (b, s h, i, j), before `post_softmax`."""
        return talking_heads_weights(q, k, _mix(self.pre_softmax), mask=mask, causal=self.causal, scale=self.scale)

    def weights(self, q: Tensor, k: Tensor, mask: Tensor | None) -> Tensor:
        return mix_heads(self.softmax_weights(q, k, mask), _mix(self.post_softmax))

    def merge(self, out: Tensor, x: Tensor) -> Tensor:
        return super().merge(
            out if x.ndim == 3 else out.view(out.shape[0], self.streams, self.heads, *out.shape[2:]), x
        )

    def attention_map(
        self,
        x: Tensor,
        *,
        mask: Tensor | None = None,
        attn_mask: Tensor | None = None,
        document_ids: Tensor | Documents | None = None,
        position_ids: Tensor | None = None,
        mixed: bool = True,
    ) -> Tensor:
        """The weights (b, s h, i, j) on the values; with `mixed=False` the softmax, before `post_softmax`."""
        q, k, _, pairs = self.project_rows(x, mask, attn_mask, document_ids, position_ids)
        return self.weights(q, k, pairs) if mixed else self.softmax_weights(q, k, pairs)

    def queries_and_keys(self, x: Tensor) -> tuple[Tensor, Tensor, HeadMix]:
        """Queries and keys (b, s h, n, e) and `pre_softmax`, the inputs of the stream diversity loss."""
        q, k, _ = self.project(x, start=0)
        return q, k, _mix(self.pre_softmax)

    @property
    def num_maps(self) -> int:
        return self.streams * self.heads

    def check_inputs(
        self,
        x: Tensor,
        mask: Tensor | None,
        attn_mask: Tensor | None = None,
        document_ids: Tensor | Documents | None = None,
        position_ids: Tensor | None = None,
        *,
        earlier: int = 0,
    ) -> Documents | None:
        if isinstance(x, Tensor) and (self.streams > 1 or x.ndim == 4):
            if x.ndim != 4 or x.shape[1] != self.streams:
                want = f"(b, streams, n, dim) with streams={self.streams}, dim={self.dim}"
                raise ValueError(f"x must be {want}, got shape {tuple(x.shape)}")
            x = x[:, 0]
        return super().check_inputs(x, mask, attn_mask, document_ids, position_ids, earlier=earlier)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, streams={self.streams}"


def _mix(mixer: HeadMixer | None) -> HeadMix:
    return None if mixer is None else mixer()
